"""How packages are made, checked and tried: `python -m release build|audit|try`. Needs the extra `release`."""
