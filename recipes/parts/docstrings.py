"""More English that is always there: the docstrings of the standard library."""

import re
import sysconfig
from functools import cache
from pathlib import Path

from parts.corpus import Documents, sentences, split_english

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
LEFT_OUT = {"site-packages", "test", "tests", "lib2to3", "idlelib", "ensurepip", "pydoc_data"}


@cache
def docstrings() -> Documents:
    """Return the sentences of every docstring, each sentence once and none that is held out for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    seen = {sentence for document in split_english()["validation"] for sentence in document}
    documents = []
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.intersection(path.relative_to(root).parts):
            continue
        for text in DOCSTRING.findall(path.read_text(errors="ignore")):
            fresh = [sentence for sentence in dict.fromkeys(sentences(text)) if sentence not in seen]
            seen.update(fresh)
            documents += [fresh] if fresh else []
    return documents
