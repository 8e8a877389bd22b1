"""What the comparison models share: how one is trained, and the search space of all."""

import torch

from promptmm import Pair, Run, fit, load_finished

GRID = {
    "lr_student": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "l2": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "batch": (0, 2048, 4096, 8192),
}


def train(run: Run, kind: type) -> Pair:
    """One model of MODELS, trained as the student is: the selected epoch's embeddings.

    run.config: the model's own Settings. Its step is `lr_student`.
    """
    torch.manual_seed(run.config.seed)
    model = kind(run.dataset, run.config, run.device)
    groups = [{"params": list(model.parameters()), "lr": run.config.lr_student}]
    each_epoch = getattr(model, "each_epoch", None)
    if not load_finished(run, "model", model):
        fit(run, "model", model, groups, kind.width, model.terms, model, each_epoch)
    model.eval()
    with torch.no_grad():
        return model()
