"""JSON that every program reads: it has no infinity, and nothing that is not a number."""

import json
import math
from typing import Any


def json_text(data: Any, **options: Any) -> str:
    """`data` as ``json.dumps(data, **options)`` gives it, with null for floats that are not finite."""
    return json.dumps(_finite(data), allow_nan=False, **options)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
