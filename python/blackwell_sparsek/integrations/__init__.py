"""Bridges to other libraries, each imported on its own: none is needed by the package itself."""
