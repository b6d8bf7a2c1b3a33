"""`python -m var_train`, which is what torchrun starts."""

from __future__ import annotations

try:
    from .command import main
except ImportError as error:
    raise SystemExit(f"error: training needs {error.name}; pip install 'var-deploy[train]'") from None

if __name__ == "__main__":
    main()
