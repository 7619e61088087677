"""What a native observer would cost: a C++ callback at every operation that looks at each result, and nothing more.

It knows no module, no line and no memory, so it is a floor and not an observer: the price at which every operation of a
step, forward and backward, can be looked at from outside Python. It is compiled on first use, for half a minute.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

_SOURCE = """
#include <torch/extension.h>
#include <ATen/record_function.h>
#include <cmath>

static thread_local int64_t num_nonfinite = 0;
static thread_local const void* last_seen = nullptr;

static void look(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.scalar_type() != at::kFloat || !tensor.is_contiguous() || tensor.is_meta()) return;
  // Composite operations are called several times for one result.
  if (tensor.unsafeGetTensorImpl() == last_seen) return;
  last_seen = tensor.unsafeGetTensorImpl();
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(tensor.const_data_ptr());
  const int64_t size = tensor.numel();
  uint32_t top = 0;
  for (int64_t n = 0; n < size; ++n) { uint32_t v = bits[n] & 0x7fffffffu; top = v > top ? v : top; }
  if (top >= 0x7f800000u) ++num_nonfinite;
}

static void at_end(const at::RecordFunction& fn, at::ObserverContext*) {
  const char* name = fn.name();
  if (std::strstr(name, "empty") || std::strstr(name, "view") || std::strstr(name, "detach")) return;
  for (const auto& value : fn.outputs()) if (value.isTensor()) look(value.toTensor());
}

int64_t begin() {
  return at::addThreadLocalCallback(at::RecordFunctionCallback(
    [](const at::RecordFunction&) -> std::unique_ptr<at::ObserverContext> { return nullptr; }, &at_end)
    .needsOutputs(true).scopes({at::RecordScope::FUNCTION}));
}
void end(int64_t handle) { at::removeCallback(handle); }
int64_t count() { return num_nonfinite; }
"""


@cache
def native() -> Any:
    """The compiled callback.

    Raises:
        RuntimeError: If there is no C++ compiler or no ninja.
    """
    from torch.utils.cpp_extension import load_inline

    flags = ["-O3", "-march=native"]
    return load_inline("nanhunt_native_floor", _SOURCE, functions=["begin", "end", "count"], extra_cflags=flags)


@contextlib.contextmanager
def looking_natively() -> Iterator[None]:
    """Looks at every result of every operation inside."""
    handle = native().begin()
    try:
        yield
    finally:
        native().end(handle)
