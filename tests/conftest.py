"""What holds for every test: code of exported repositories is imported from a folder of this session's."""

import atexit
import os
import shutil
import tempfile

# Before transformers is imported, which reads it once; a process can have only one such folder.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="llmnorm-test-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
