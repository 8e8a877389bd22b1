"""Small things that several test files share."""

import numpy as np
import pytest
import torch
from hypothesis import settings

import data
import promptmm

settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)  # the models here are tiny: threads would only wait for each other

TINY = {"users": 60, "items": 40, "interactions": 900, "dims": {"visual": 24, "text": 12}}
SHORT = [
    "--epochs",
    "4",
    "--eval-every",
    "1",
    "--dim",
    "8",
    "--batch",
    "128",
    "--negatives",
    "3",
]


@pytest.fixture
def tiny() -> data.Dataset:
    return data.synthetic(**TINY)


@pytest.fixture
def config() -> promptmm.Config:
    return promptmm.Config(
        dim=8, batch=128, negatives=3, epochs=3, eval_every=1, dropout=0.3
    )


@pytest.fixture
def folder(tmp_path, tiny):
    """The tiny dataset in the native layout."""
    data.save(tiny, tmp_path / "shop")
    return tmp_path / "shop"


@pytest.fixture
def batch(tiny):
    """Users [B] and their lists [B, 4]."""
    users, lists = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(0), 3)
    return users[:64], lists[:64]


@pytest.fixture
def run(tmp_path, tiny, config):
    (tmp_path / "run").mkdir()
    return promptmm.Run(tmp_path / "run", tiny, config, torch.device("cpu"), {})


def replaced(dataset: data.Dataset, **parts) -> data.Dataset:
    """A copy of a dataset with other parts."""
    return data.Dataset(**{**vars(dataset), **parts})


def dense(dataset: data.Dataset) -> np.ndarray:
    return dataset.train.toarray()
