"""TD3 and SAC written once more from their papers, in float64, one line after another.

Networks are called, but none of the scripts' losses or updates. Both return the agent as it is
after one update on each of `batches`: transitions, and the noise of the target's and the actor's
actions. θ moves by gradient descent, with a learning rate for each of "critic", "actor", "alpha".
"""

import copy
import math

import torch
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform


def descend(loss: torch.Tensor, parameters, rate: float) -> None:
    """θ <- θ - rate ∂loss/∂θ"""
    parameters = [*parameters]
    with torch.no_grad():
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            p -= rate * gradient


def follow(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ' <- τ θ + (1 - τ) θ'"""
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), online.parameters()):
            slow.copy_(tau * fast + (1 - tau) * slow)


def td3(agent: nn.Module, batches: list, rates: dict[str, float], args) -> nn.Module:
    """Algorithm 1 of Fujimoto et al. (2018), whose actor needs no noise here."""
    agent = copy.deepcopy(agent).double()
    (q1, q2), (slow_q1, slow_q2) = agent.critics, agent.target_critics
    for t, (batch, (noise, _)) in enumerate(batches, start=1):
        s, a, r, next_s, terminated = (x.double() for x in batch)
        with torch.no_grad():
            epsilon = (args.target_noise * noise.double()).clip(-args.noise_clip, args.noise_clip)
            next_a = (agent.target_actor(next_s) + epsilon).clip(-1, 1)
            next_q = torch.minimum(slow_q1(next_s, next_a), slow_q2(next_s, next_a))
            y = torch.where(terminated.bool(), r, r + args.gamma * next_q)
        for q in (q1, q2):
            descend(((y - q(s, a)) ** 2).mean(), q.parameters(), rates["critic"])
        if t % args.policy_frequency == 0:
            descend(-q1(s, agent.actor(s)).mean(), agent.actor.parameters(), rates["actor"])
            for slow, fast in ((slow_q1, q1), (slow_q2, q2), (agent.target_actor, agent.actor)):
                follow(slow, fast, args.tau)
    return agent


def sample(actor: nn.Module, s: torch.Tensor, noise: torch.Tensor):
    """a = tanh(mean + std noise) and log π(a|s), from the actor's layers and PyTorch's own tanh."""
    h = actor.hidden2(actor.hidden1(s).relu()).relu()
    mean, log_std = actor.output(h).tensor_split(2, -1)
    normal = Normal(mean, log_std.clip(-20, 2).exp())
    tanh = TanhTransform(cache_size=1)  # the cache makes the inverse exact
    a = tanh(normal.mean + normal.stddev * noise.double())
    return a, TransformedDistribution(Independent(normal, 1), [tanh]).log_prob(a)


def sac(agent: nn.Module, batches: list, rates: dict[str, float], args) -> nn.Module:
    """Algorithm 1 of Haarnoja et al. (2018, Applications)."""
    agent = copy.deepcopy(agent).double()
    (q1, q2), (slow_q1, slow_q2) = agent.critics, agent.target_critics
    for batch, (next_noise, noise) in batches:
        s, a, r, next_s, terminated = (x.double() for x in batch)
        alpha = math.exp(agent.log_alpha.item())
        with torch.no_grad():
            next_a, next_log_prob = sample(agent.actor, next_s, next_noise)
            next_q = torch.minimum(slow_q1(next_s, next_a), slow_q2(next_s, next_a))
            next_v = next_q - alpha * next_log_prob
            y = torch.where(terminated.bool(), r, r + args.gamma * next_v)
        for q in (q1, q2):
            descend(((y - q(s, a)) ** 2).mean(), q.parameters(), rates["critic"])
        a, log_prob = sample(agent.actor, s, noise)
        loss = (alpha * log_prob - torch.minimum(q1(s, a), q2(s, a))).mean()
        descend(loss, agent.actor.parameters(), rates["actor"])
        if args.autotune:  # J(α) = E[-α log π - α H] with H = -|A|
            entropy = -a.shape[-1]
            loss = (-agent.log_alpha.exp() * (log_prob.detach() + entropy)).mean()
            descend(loss, [agent.log_alpha], rates["alpha"])
        follow(slow_q1, q1, args.tau)
        follow(slow_q2, q2, args.tau)
    return agent
