"""Whether an output folder holds what was written into it, and making again what it does not.

`verify` looks, `repair` makes good. What each kind of folder promises, and how that is checked:

- files and an index of rows (`kinds`, `files`, `rows`): every file against its line in
  ``checksums.tsv``; rows against files, files against rows; rows against themselves, since names
  are made of what the rows say;
- a zarr store (`store`): every chunk against its CRC-32C, the index against the digest that its
  folder is named by, what is committed and not merged;
- volumes (`volumes`): every chunk against its XXH3 in the metadata;
- tiles of an inference (`cellpose`): records and masks against ``checksums.tsv``, the tables
  against the records.
"""

from .findings import Finding, Verdict
from .recognise import NotRecognised
from .repair import Repair, committed, repair, verify

__all__ = ["Finding", "NotRecognised", "Repair", "Verdict", "committed", "repair", "verify"]
