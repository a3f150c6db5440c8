import sys

# gdcm, which pydicom imports, tries `import dl`, a module of Python 2: a folder called dl would be taken for it
sys.modules.setdefault("dl", None)  # type: ignore[arg-type]
