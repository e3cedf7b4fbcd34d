"""A complete task of one's own: predict how diabetes went on after a year, from 442 patients."""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset, random_split


class Diabetes:
    def __init__(self, width, seed):
        features, progression = load_diabetes(return_X_y=True, scaled=False)
        x, y = torch.tensor(features).float(), torch.tensor(progression).float()
        data = TensorDataset((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std())
        self.train_set, self.eval_set = random_split(data, [362, 80], torch.Generator().manual_seed(seed))
        self.width = width

    def model(self):
        return nn.Sequential(nn.Linear(10, self.width), nn.Tanh(), nn.Linear(self.width, 1), nn.Flatten(0))

    def loss(self, model, batch):  # the mean over the samples of the batch
        features, progression = batch
        return nn.functional.mse_loss(model(features), progression)

    def metrics(self, model, batch):
        return {"unexplained_variance": self.loss(model, batch)}


def diabetes(width=16, seed=0):  # task.options of the config arrive here by name, the run's seed as seed
    return Diabetes(width, seed)
