"""Federated averaging with Flower: an app of your own, whose clients train what they receive with an optimizer of pws.optim."""

import logging
import random

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import nn

import pws
from pws.federated import Simulation

torch.manual_seed(0)
random.seed(0)  # Flower's strategies draw clients with it
logging.getLogger("flwr").setLevel(logging.ERROR)

digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0
# Five clients, and each of them has images of two digits more than of the others.
owner = torch.where(torch.rand(len(labels)) < 0.5, labels // 2, torch.randint(5, (len(labels),)))

model = nn.Sequential(
    *(pws.mark(nn.Conv2d(1, 16, 3, padding=1), gain="linear", reset_parameters=True), nn.ReLU()),
    *(pws.mark(nn.Conv2d(16, 32, 3, padding=1), reset_parameters=True), nn.ReLU(), nn.MaxPool2d(2)),
    *(
        pws.mark(nn.Conv2d(32, 32, 3, padding=1), reset_parameters=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ),
    pws.mark(nn.Linear(32, 10), reset_parameters=True),
)
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received weights for an epoch. They are plain weights, and the new optimizer adopts them."""
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = pws.optim.SGD(model, lr=0.1, momentum=0.9)
    own = torch.nonzero(~test & (owner == context.node_config["partition-id"])).flatten()
    for batch in own[torch.randperm(len(own))].split(16):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(own), "loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


# All clients in this process. With `flwr run` the same app trains on machines of their own.
grid = Simulation(app, clients=5)
result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(model.state_dict()), num_rounds=10)
model.load_state_dict(result.arrays.to_torch_state_dict())
with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"average of 5 clients after 10 rounds: test accuracy {100 * accuracy:.1f} %")
