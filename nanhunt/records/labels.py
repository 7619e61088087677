"""What people call the labels and the weights of a loss."""

import re

_LABELS = {
    *("label", "labels", "lbl", "target", "targets", "tgt", "tgts", "y", "ys", "true", "gt", "truth", "groundtruth"),
    *("answer", "answers", "annotation", "annotations"),
}
_SOMETHING_ELSE = {
    *("pred", "preds", "predicted", "prediction", "predictions", "hat", "score", "scores", "logit", "logits", "mask"),
    *("masks", "padding", "length", "lengths", "network", "net", "model", "encoder", "weight", "weights"),
}
_ROLE = re.compile(r"(?:^|\()(\w+) of (\w+)\)?$")


def is_label(name: str) -> bool:
    """Whether a variable, key or argument of this name holds labels: ``batch['y_true']``, but not ``y_pred``.

    Where the name ends in what a loss calls it, as in ``batch[1] (target of mse_loss)``, that decides.
    """
    words = _words(name)
    return bool(words) and not _SOMETHING_ELSE & set(words) and bool(_LABELS & {words[0], words[-1]})


def is_loss_weight(name: str) -> bool:
    """Whether a loss takes it as its weights of samples or classes: ``w (pos_weight of BCEWithLogitsLoss)``."""
    role = _ROLE.search(name)
    return role is not None and role[1] in ("weight", "pos_weight")


def _words(name: str) -> list[str]:
    """The words of the last part of a path that has any."""
    role = _ROLE.search(name)
    parts = [role[1]] if role else re.split(r"[.\[]", name)
    named = [part for part in parts if re.search(r"[A-Za-z]", part)]
    words = re.findall(r"[a-z]+", named[-1].lower()) if named else []
    return words[1:] if words[:1] == ["input"] and len(words) > 1 else words
