"""The Cellpose-SAM fine-tuning study: data, training, evaluation, sweeps, ablations.

images, tiles, dataset   what is on disk, whose it is, and the split by donor
metrics                  AP, precision, recall, F1
network, cache, masks    one network pass per image; flows to masks at any thresholds
evaluate, sweep, gate    numbers of one model, and thresholds chosen on val for test
train, watch             cellpose's training, watched and resumable
experiment               label efficiency, leave one marker out
infer, clinical, donors  counts of every tile, and donors against their clinical outcomes
intervals, report        confidence intervals of metrics; all of a study on one page
"""

import importlib.util

if importlib.util.find_spec("cellpose") is None:
    raise ImportError("the Cellpose study needs cellpose: pip install 'fastembed-vision[cellpose]'")
