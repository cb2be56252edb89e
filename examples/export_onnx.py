"""A trained model goes to ONNX: folded to plain torch.nn layers, it runs where neither torch nor pws is installed."""

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import pws

torch.manual_seed(0)

# 1,797 images of handwritten digits, 8 x 8 pixels.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)

# pws.Conv2d and pws.Linear standardize their weight in the forward pass. Any optimizer trains them.
model = nn.Sequential(
    *(pws.Conv2d(1, 16, 3, padding=1, gain="linear"), nn.ReLU()),
    *(pws.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), pws.Linear(128, 10)),
)
optimizer = torch.optim.SGD(pws.param_groups(model, lr=0.1, weight_decay=5e-4), momentum=0.9)
for batch in torch.randperm(1500).split(32):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    pws.clip_grad(model, optimizer)  # bounds the step of each layer
    optimizer.step()

# Fold the kernels into plain layers: inference costs nothing, and every exporter knows them.
folded = pws.fold(model).eval()
print(folded)

batch = torch.export.Dim("batch")
torch.onnx.export(
    *(folded, (images[:2],), "digits.onnx"),
    input_names=["images"],
    output_names=["logits"],
    dynamo=True,
    dynamic_shapes=({0: batch},),  # the file takes any number of images
    verbose=False,
)

session = onnxruntime.InferenceSession("digits.onnx", providers=["CPUExecutionProvider"])
logits = torch.from_numpy(session.run(None, {"images": images[1500:].numpy()})[0])
with torch.no_grad():
    difference = (logits - model(images[1500:])).abs().max()
accuracy = (logits.argmax(1) == labels[1500:]).float().mean()
print(f"digits.onnx: test accuracy {100 * accuracy:.1f} %, logits within {difference:.0e} of the model's")
