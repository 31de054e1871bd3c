"""The mechanism under every loss, which knows none of them."""

from .op import (  # noqa: F401 re-exported
    _OPS,
    BACKENDS,
    Loss,
    Op,
    backend_report,
    backends,
    check_not_empty,
    check_reduction,
    full_precision,
    is_forced,
    is_interpreting,
    reduce,
    result_dtype,
    transformed,
    use_backend,
    with_parameter,
)
