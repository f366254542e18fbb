"""MAML-TRPO's update written once more from the papers, with a real copy of the weights a task.

The policy is called, but nothing else of the script. Everything is a plain function of a dict of
parameters, and every derivative is PyTorch's own reverse mode, once, twice or three times.
"""

import numpy as np
import torch
from torch.autograd import grad
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call

Parameters = dict[str, torch.Tensor]


def distribution(policy, theta: Parameters, batch) -> Independent:
    """π(.|s) of one task at the N states of its batch."""
    mean, log_std = functional_call(policy, theta, (batch.context, batch.obs))
    return Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)


def adapt(policy, theta: Parameters, batches: list, args) -> Parameters:
    """Eq. 15, once for each of the batches: θ_i <- θ_i + η ∇ mean Â log π_{θ_i}(a|s)"""
    for batch in batches:
        log_prob = distribution(policy, theta, batch).log_prob(batch.action)
        objective = (batch.sample_weight * batch.advantage * log_prob).sum()
        gradients = grad(objective, [*theta.values()], create_graph=True)
        theta = {n: p + args.inner_lr * g for (n, p), g in zip(theta.items(), gradients)}
    return theta


def update(policy, pre: list, post, args) -> Parameters:
    """The parameters after one step of TRPO (Schulman et al., 2015) on the adapted policies.

    `pre` has what each inner step learns from, `post` the samples of the adapted policies.
    """
    T, theta = len(post.context), {n: p.detach().clone() for n, p in policy.named_parameters()}
    weights = [p.requires_grad_() for p in theta.values()]

    def of_task(batch, i: int):
        return type(batch)(*(x[i : i + 1] for x in batch))

    tasks = [([of_task(batch, i) for batch in pre], of_task(post, i)) for i in range(T)]
    steps = []
    for batches, _ in tasks:
        theta_i = adapt(policy, theta, batches, args)
        steps.append({n: (theta_i[n] - theta[n]).detach() for n in theta})

    def policies(new: Parameters) -> list[Independent]:
        if args.first_order:  # the steps stay what they were
            adapted = [{n: new[n] + step[n] for n in new} for step in steps]
        else:
            adapted = [adapt(policy, new, batches, args) for batches, _ in tasks]
        return [distribution(policy, theta_i, b) for theta_i, (_, b) in zip(adapted, tasks)]

    old = [Independent(Normal(d.mean.detach(), d.stddev.detach()), 1) for d in policies(theta)]

    def surrogate_and_kl(new: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over the tasks of Â π_new / π_old and of KL(π_old ‖ π_new)"""
        surrogate = kl = 0.0
        for pi, pi_old, (_, b) in zip(policies(new), old, tasks):
            ratio = (pi.log_prob(b.action) - pi_old.log_prob(b.action)).exp()
            surrogate = surrogate + (b.sample_weight * b.advantage * ratio).sum() / T
            kl = kl + (b.sample_weight * kl_divergence(pi_old, pi)).sum() / T
        return surrogate, kl

    def flat(tensors) -> torch.Tensor:
        return torch.cat([x.flatten() for x in tensors])

    before, kl = surrogate_and_kl(theta)
    gradient = flat(grad(before, weights, retain_graph=True))
    kl_gradient = flat(grad(kl, weights, create_graph=True))

    def hessian(v: torch.Tensor) -> torch.Tensor:
        return flat(grad(kl_gradient @ v, weights, retain_graph=True)) + args.cg_damping * v

    # Conjugate gradients after n iterations: x that minimises x H x / 2 - x g over the space that
    # g, H g, ... H^(n-1) g span
    K = (gradient / gradient.norm())[:, None]
    for _ in range(args.cg_iterations - 1):
        v = hessian(K[:, -1])
        for _ in range(2):  # Gram and Schmidt's way, and once more for the rounding errors
            v = v - K @ (K.T @ v)
        K = torch.cat([K, (v / v.norm())[:, None]], 1)
    H_K = torch.stack([hessian(v) for v in K.T], 1)
    direction = K @ torch.linalg.solve(K.T @ H_K, K.T @ gradient)

    step = (2 * args.max_kl / (direction @ hessian(direction))).sqrt() * direction
    pieces = step.detach().split([p.numel() for p in weights])
    step = {n: piece.view_as(theta[n]) for n, piece in zip(theta, pieces)}
    for k in range(args.line_search_steps):
        new = {n: (theta[n] + 0.8**k * step[n]).detach().requires_grad_() for n in theta}
        after, kl = surrogate_and_kl(new)
        if after > before and kl <= args.max_kl:
            return new
    return theta


def advantages(obs, reward, lengths, gamma: float, lam: float) -> np.ndarray:
    """Those of one task's steps over a linear baseline, normalised: obs (E, H, x), reward (E, H)"""
    features, returns, advantages = [], [], []
    for e, length in enumerate(lengths):
        for t in range(length):
            time = t / 100
            features.append([*obs[e, t], *obs[e, t] ** 2, time, time**2, time**3, 1.0])
            returns.append(sum(gamma ** (k - t) * reward[e, k] for k in range(t, length)))
    X, y = np.array(features), np.array(returns)
    values = iter(X @ np.linalg.solve(X.T @ X + 1e-5 * np.eye(X.shape[1]), X.T @ y))
    for e, length in enumerate(lengths):
        value = [next(values) for _ in range(length)] + [0.0]
        delta = [reward[e, t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantages.append(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)))
    return (advantages - np.mean(advantages)) / np.sqrt(np.var(advantages) + 1e-8)
