"""Table 4's comparison models: what are the others, under the same protocol?

A model is a file and a line in MODELS. Its class has

    Settings            promptmm.Config, or a frozen subclass; own fields are `of="model"`
    SPACE               what the search may try, a value's name -> values
    width               columns of `lists` that it asks for: 2, or 1 + negatives, or 1
    __init__(dataset, config, device)
    forward()           -> (user [U, e], item [I, e]), any e; ranked by inner products
    terms(users, lists) -> {name: loss}; the objective is its sum, every term is logged
    each_epoch()        optional: what is drawn or rebuilt anew each epoch
    features            optional: name -> the frozen numbers it must hold, for Table 6

and a docstring that says what differs from its paper. `common.train` trains any of them
with the core's own loop; tests/test_registry.py holds each to the same contract. What needs
no training at all (profiles of the content, LightGCN plus profiles) is in profile.py.
"""

from baselines.bm3 import BM3
from baselines.clcrec import CLCRec
from baselines.freedom import FREEDOM
from baselines.grcn import GRCN
from baselines.lattice import LATTICE
from baselines.lightgcn import LightGCN
from baselines.mf_bpr import MFBPR
from baselines.mmgcn import MMGCN
from baselines.ngcf import NGCF
from baselines.slmrec import SLMRec
from baselines.vbpr import VBPR

MODELS = {  # in the paper's order, then two of later years
    "MF-BPR": MFBPR,
    "NGCF": NGCF,
    "LightGCN": LightGCN,
    "VBPR": VBPR,
    "MMGCN": MMGCN,
    "GRCN": GRCN,
    "CLCRec": CLCRec,
    "SLMRec": SLMRec,
    "LATTICE": LATTICE,
    "FREEDOM": FREEDOM,
    "BM3": BM3,
}
