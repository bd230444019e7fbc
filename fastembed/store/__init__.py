"""A store for millions of vectors: ``embeddings.zarr`` and ``index.parquet``.

What a finished run leaves in its folder:

- ``embeddings.zarr``: zarr v3, [N, D] float16 or float32, shards of 4,096 rows in inner chunks of
  64, each with a CRC-32C. zarr-python, TensorStore and zarrs read it.
- ``index.parquet``: a line per row: name, the job's fields, row. Sorted by the fields.

Both are links into ``store-<digest>/``. The digest is of the index and the settings, so the whole
folder is a function of what was embedded: not of order, shards, kills or the number of runs.

How it comes about, and why so:

- A commit appends one record to the run's own ``staged-<token>.log`` (`journal`): index rows,
  vectors and a checksum, then one sync. A record that is whole is committed; a torn one is not
  there. Rows cannot go to their place in the array at once: it depends on all keys.
- The last run to leave the folder merges (`merge`): it sorts the keys, streams old store and logs
  shard by shard into a new one beside the old, syncs it and flips one link. A thousand shards at
  once merge once. A killed run's logs are read by the next one, which merges them.
- ``index.parquet`` is a link through ``embeddings.zarr``, so that this one flip, which is atomic on
  every file system, changes both. A reader has the old store or the new one. (Two folders cannot
  be exchanged atomically on NFS or Lustre, nor two files anywhere.) Copy with ``cp -a``,
  ``rsync -a`` or ``tar``; a copy that follows links can be read, but no run adds to it.
- Shards whose rows are what they were are hard links to the old ones: keys that sort last cost
  only the tail. Keys in between move all rows after them, since rows are dense and in the order of
  the keys; such a merge costs a read and a write of the store. Holes would avoid that, but every
  other reader would have to know of them.
- No compression: see `shards`.

A run that was killed before its merge left a store as it was before (or none), and logs.
`EmbeddingStore` reads the former and warns of the latter.

Needs the extra ``zarr``.
"""

try:
    import google_crc32c  # noqa: F401
    import pyarrow  # noqa: F401
    import xxhash  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the zarr format needs pyarrow, xxhash and google-crc32c ({error}): "
        "pip install 'fastembed-vision[zarr]'"
    ) from error

from .writer import Parquet, SegmentParquet, Zarr

__all__ = ["Parquet", "SegmentParquet", "Zarr"]
