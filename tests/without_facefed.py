"""How a program of a test is kept from FaceFed, as if it were not installed: its first lines."""

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("common", "server", "clients", "simulation"):
            raise ModuleNotFoundError(f"no {name} here")
sys.meta_path.insert(0, Blocker())
try:
    import common
except ModuleNotFoundError:
    pass
else:
    sys.exit("the blocker does not block")
"""
