"""The ppomax engine: `from ppomax.engine import PPOTrainer, preset`."""

if __name__ != "ppomax.engine":
    raise ImportError(
        f"imported as {__name__!r}: the package is called ppomax.engine; under another name every class would "
        "exist twice. Install the project (pip install -e .) and write `import ppomax.engine`"
    )
