"""A GAN: two `TrainStep`s in one's own loop. A generator learns to draw from a normal distribution N(4, 0.5)."""

import torch
from torch import nn

import fivestep as fs

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(1, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
critic = nn.Sequential(nn.Linear(1, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))  # a logit: how real it looks
binary = nn.BCEWithLogitsLoss()


def fooling(judged, wanted):
    """The generator's loss: the critic's opinion of what was drawn. The gradient passes through the critic."""
    return binary(critic(judged), wanted)


teach_critic = fs.TrainStep(critic, binary, torch.optim.Adam(critic.parameters(), lr=1e-2, betas=(0.5, 0.9)))
teach_generator = fs.TrainStep(
    generator, fooling, torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
)
rows = 128
real, fake = torch.ones(rows, 1), torch.zeros(rows, 1)

for step in range(1, 1001):
    with torch.no_grad():
        drawn = generator(torch.randn(rows, 1))
    samples = 4 + 0.5 * torch.randn(rows, 1)
    critics = teach_critic((torch.cat([samples, drawn]), torch.cat([real, fake])))
    # Each step zeroes the gradients of its own optimizer first, so what the generator's step leaves in the critic's
    # `.grad` is never applied.
    generators = teach_generator((torch.randn(rows, 1), real))
    if step % 250 == 0:
        print(f"step {step}: critic {critics.loss.item():.3f}, generator {generators.loss.item():.3f}")

with torch.no_grad():
    drawn = generator(torch.randn(10_000, 1))
print(f"drawn: mean {drawn.mean():.2f}, standard deviation {drawn.std():.2f}; wanted 4.00 and 0.50")
