"A margin loss in a plain PyTorch training loop, on scikit-learn's digits: `python examples/plain_pytorch.py`."
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from largest_margins.heads import CosineLinear
from largest_margins.losses import LMSoftmaxLoss
from largest_margins.margins import class_margin, sample_margins


def main(epochs=10):
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = train_test_split(x / 16, y, test_size=.25, random_state=0, stratify=y)
    x, x_test, y, y_test = (torch.tensor(v, dtype=torch.float32 if v.ndim == 2 else torch.int64) for v in data)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), CosineLinear(32, 10))
    loss_func = LMSoftmaxLoss(scale=20.)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    for epoch in range(epochs):
        for images, targets in DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True):
            loss = loss_func(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad(): cosines = model(x_test)
        accuracy = (cosines.argmax(1) == y_test).float().mean()
        print(f'epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy:.3f}, '
              f'class margin {class_margin(model[-1].weight).rad2deg().item():.1f} degrees, '
              f'mean sample margin {sample_margins(cosines, y_test).mean():.3f}')


if __name__ == '__main__': main()
