"""What was seen, as frozen dataclasses without torch: judged and printed on any machine."""
