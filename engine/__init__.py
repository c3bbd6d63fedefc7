"""LiveSfM: videos and photos into a growing, bundle-adjusted COLMAP model."""

import sys
import warnings

# COLMAP's wheel for Linux exports a zlib of its own. The system's, where it is loaded after that,
# mixes the two, and what compresses ends the process: `import pycolmap, zlib; zlib.compress(b"")`.
if sys.platform == "linux" and "pycolmap" in sys.modules and "zlib" not in sys.modules:
    warnings.warn(
        "pycolmap was imported before zlib, so that writing PNG files may end this process: "
        "import livesfm, or zlib, first",
        RuntimeWarning,
        stacklevel=2,
    )
import zlib  # noqa: E402, F401 - before any module of the engine imports pycolmap
