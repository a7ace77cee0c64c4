import sys
from pathlib import Path

# The tests of this folder share fake_model.py, which belongs to no package.
sys.path.insert(0, str(Path(__file__).parent))
