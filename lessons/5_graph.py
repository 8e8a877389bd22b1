"""The loss falls, the ranking is wrong: where is the bug?

Paper: Eq. 2 and Section 4.1.3; the bug is one that the released code has.

What do you expect? Two LightGCNs, alike but for the matrix they propagate over. One matrix
has a bug. Both losses fall. Four prints follow; find the bug in them before you read on.
    a) The wrong one cannot learn: its loss would stay where it was.
    b) It learns, and ranks no better than popularity does.
    c) It learns, and ranks nearly as well: training repairs it.

The output (3 s of one core; numbers move by ± 0.03 on another machine):

                                            matrix 1          matrix 2
    1. BPR in training, first look             0.632             0.579
       last look                               0.442             0.118
       test Recall@20                          0.167             0.253
    2. sum of |M - M'|, of |M|            2180, 1099           0, 1099
    3. last column of a user's row               499              1299
    4. first columns of row 0          [173 228 308]  [ 973 1028 1108]
    Of 800 users (500 items), user 0 took [173 228 308] and more. MostPop has 0.168.
"""

# %%
import numpy as np
import torch
from scipy import sparse

import data
from evaluate import most_popular
from experiments.errata import released_adjacency
from lessons import common
from promptmm import Student, adjacency


# %%
def scaled(nodes):
    """D^-1/2 M D^-1/2 of a matrix of nodes: what is wrong is not this."""
    degrees = (np.diff(part.indptr) for part in (nodes.tocsr(), nodes.tocsc()))
    rows, columns = (sparse.diags(np.maximum(d, 1) ** -0.5) for d in degrees)
    return (rows @ nodes @ columns).tocsr()


class Over(Student):
    """LightGCN over any matrix M [U+I, U+I]: the mean of E, M E and M M E."""

    def __init__(self, train, config, nodes):
        torch.manual_seed(config.seed)
        super().__init__(train, config)
        coo = nodes.tocoo()
        cells = torch.from_numpy(np.stack([coo.row, coo.col])).long()
        values = torch.from_numpy(coo.data).float()
        self.nodes = torch.sparse_coo_tensor(
            cells, values, coo.shape, check_invariants=True
        )

    def forward(self):
        ids = torch.cat([self.user, self.item])  # [U+I, d]
        once = torch.sparse.mm(self.nodes, ids)
        total = ids + once + torch.sparse.mm(self.nodes, once)
        return (total / 3).split([len(self.user), len(self.item)])


def measure(seed: int = 0, quick: bool = False) -> dict:
    dataset = data.synthetic(seed=seed, **common.SMALL)
    config = common.short(seed, quick, epochs=20)
    wrong, right = scaled(released_adjacency(dataset.train)), adjacency(dataset.train)
    n_users, n_items = dataset.train.shape
    popular = common.recall(most_popular(dataset.train, "cpu"), dataset)
    found = {"users": n_users, "items": n_items, "popular": popular}
    found["taken"] = dataset.train[0].indices[:3]
    for name, nodes in ("matrix 1", wrong), ("matrix 2", right):
        model = Over(dataset.train, config, nodes)
        recall = common.recall(common.by_bpr(model, dataset, config), dataset)
        size = abs(nodes).sum()
        found[name] = {
            "1. BPR in training, first look": f"{model.losses[0]:.3f}",
            "   last look": f"{model.losses[-1]:.3f}",
            "   test Recall@20": f"{recall:.3f}",
            "2. sum of |M - M'|, of |M|": f"{abs(nodes - nodes.T).sum():.0f}, {size:.0f}",
            "3. last column of a user's row": nodes[:n_users].nonzero()[1].max(),
            "4. first columns of row 0": nodes[0].nonzero()[1][:3],
        }
    return found


def show(found: dict) -> str:
    names = "matrix 1", "matrix 2"
    lines = [f"{'':30}" + "".join(f"{name:>18}" for name in names)]
    for row in found["matrix 1"]:
        lines.append(f"{row:30}" + "".join(f"{str(found[n][row]):>18}" for n in names))
    end = "Of {users} users ({items} items), user 0 took {taken} and more. MostPop has"
    return "\n".join([*lines, f"{end.format(**found)} {found['popular']:.3f}."])


def claim(found: dict) -> bool:
    """Both losses fall; over the wrong graph the ranking is about popularity's."""
    wrong, right = ([*found[name].values()] for name in ("matrix 1", "matrix 2"))
    falls = all(float(run[1]) < float(run[0]) for run in (wrong, right))
    low = float(wrong[2]) < min(found["popular"] + 0.03, float(right[2]) - 0.03)
    return falls and low


# %% [markdown]
# What it means: b). In matrix 1 a user's row holds item numbers, which as nodes are users:
# item 3 is user 3, where U + 3 would be right. So users average users who share nothing
# with them, and |M - M'| is about 2 |M|: hardly a cell has its mirror. Its loss falls all
# the same: a loss says that something is learnt, not what.
# What it does not show: what this costs the released model, which has other parts too.

# %% [markdown]
# Your turn: in mine.py `adjacency(train)` [U, I] -> D^-1/2 [[0, A], [A', 0]] D^-1/2, users
# first, a sparse matrix [U+I, U+I]. Check: python -m lessons.5_graph --check mine.py
YOURS = "adjacency"


# %% [markdown]
# Next: more items than users: which print now deceives? Read: promptmm.adjacency; C1, C16.
# %%
if __name__ == "__main__":
    raise SystemExit(common.run(globals()))
