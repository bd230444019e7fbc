"""``fastembed search``: the vectors of a cache most like others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import Formatter, UsageError, add_database, positive


def add(commands) -> None:
    parser = commands.add_parser(
        "search",
        help="the vectors of a cache most like one of them, or like an image",
        formatter_class=Formatter,
        description=(
            "Finds the nearest vectors of a cache by cosine: exact, in a fixed order (of equal\n"
            "cosines the lower row first), in little memory whatever the size of the cache.\n"
            "What is asked for by its key is itself left out of the answer."
        ),
        epilog=(
            "examples:\n"
            "  fastembed search out --like emb_0a4d55a8d778e5022fab701977c5d840bbc486d0\n"
            "  fastembed search out --like plates/7.npy --k 5 --json\n"
            "  fastembed search cache/vis_embed --like 000000142238 3937500 --like photo.jpg\n"
            "\n"
            "An image goes through the model that made the cache, as its settings say; one that\n"
            "differs in anything is refused. Of a panoptic cache the whole image is one segment."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("output_dir", type=Path, metavar="DIR", help="folder of the cache")
    parser.add_argument(
        "--like",
        nargs="+",
        action="append",
        required=True,
        metavar="KEY",
        help="emb_<sha1>, IMAGE_ID SEGMENT_ID, a tensor_path of one row, or an image file; may be "
        "given several times",
    )
    parser.add_argument("--k", type=positive, default=10, metavar="N", help="default 10")
    parser.add_argument("--json", action="store_true", help="print JSON")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--weights",
        metavar="PATH",
        help="of the model, as the cache was made with; not of models from a hub",
    )
    group.add_argument(
        "--model", metavar="DIR", help="the exported model, where the cache was made with one"
    )
    add_database(
        parser.add_argument_group("database", "Where the index of DIR is, if it is no file of DIR.")
    )


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from ..caches import EmbeddingStore
    from ..neighbours import search
    from ..queries import ImageQueries, find_row
    from .convert import index_database

    if any(len(words) > 2 for words in arguments.like):
        raise UsageError(f"--like takes a key of one or two words; got {arguments.like}")
    store = EmbeddingStore(arguments.output_dir, index_database(arguments))
    rows = [find_row(store, words) for words in arguments.like]
    images = None
    vectors = []
    for words, row in zip(arguments.like, rows, strict=True):
        if row is not None:
            vectors.append(store[row].numpy())
            continue
        if len(words) == 2 or not Path(words[0]).is_file():
            raise ValueError(
                f"{' '.join(words)} is neither a key of {arguments.output_dir} nor an image file"
            )
        images = images or ImageQueries(arguments.output_dir, arguments.weights, arguments.model)
        vectors.append(images.embed(words[0]))
    found = search(store, np.stack(vectors), arguments.k, leave_out=rows)
    columns = {name: store.column(name) for name in store.columns}
    answers = [
        {
            "like": " ".join(words),
            "nearest": [
                {
                    "cosine": cosine,
                    **{name: np.asarray(column[row]).item() for name, column in columns.items()},
                }
                for row, cosine in zip(best.tolist(), cosines.tolist(), strict=True)
                if row >= 0
            ],
        }
        for words, best, cosines in zip(arguments.like, *found, strict=True)
    ]
    if arguments.json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
        return 0
    for answer in answers:
        print(answer["like"])
        for one in answer["nearest"]:
            print("  " + _line(one))
    return 0


def _line(found: dict) -> str:
    """'0.9731  000000142238 3937500  label 0': with a key that --like takes."""
    rest = {name: value for name, value in found.items() if name not in ("cosine", "name")}
    key = found["name"]
    if "segment_id" in rest:
        key = f"{rest.pop('image_id')} {rest.pop('segment_id')}"
    return "  ".join([f"{found['cosine']:.4f}", key, *(f"{n} {v}" for n, v in rest.items())])
