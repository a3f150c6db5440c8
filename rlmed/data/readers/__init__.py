import sys

# gdcm, which pydicom imports, tries `import dl`, a Python 2 module: block it, or a local folder dl would match
sys.modules.setdefault("dl", None)  # type: ignore[arg-type]
