"""PEARL's update written once more from its paper, in float64, one task after another.

Networks are called, but none of the script's losses, its encoder or its policy's distribution.
"""

import copy
import itertools

import torch
from reference_td3_sac import descend, follow
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import softplus


def posterior(encoder, context):
    """N(mean, variance) (z,), the normalised product of a task's factors: context (M, row)"""
    mean, x = encoder.net(context).tensor_split(2, -1)
    precision = 1 / softplus(x)
    return Normal((mean * precision).sum(0) / precision.sum(0), precision.sum(0) ** -0.5)


def policy(net, hyper: bool, s, z, noise):
    """a (N, action), log π(a|s, z) (N,), and the squares of mean and log_std, of one task."""
    z = z.expand(len(s), -1)
    output = net(z, s) if hyper else net(s, z)  # of hyper z makes the weights
    mean, log_std = output.tensor_split(2, -1)
    log_std = log_std.clip(-20, 2)
    normal, tanh = Normal(mean, log_std.exp()), TanhTransform(cache_size=1)
    a = tanh(normal.mean + normal.stddev * noise)
    log_prob = TransformedDistribution(Independent(normal, 1), [tanh]).log_prob(a)
    return a, log_prob, mean**2, log_std**2


def pearl(agent, batches: list, rate: float, args):
    """The agent after an update on each of `batches`: transitions, noise of z, noise of actions.

    Algorithm 1 of Rakelly et al. (2019) with V and its target, as in their code, by gradient
    descent.
    """
    agent, hyper = copy.deepcopy(agent).double(), args.model == "hyper"

    def value(critic, s, *base):
        """Q or V (N,); of hyper the states make the weights"""
        return critic.net(s, torch.cat(base, -1))[:, 0]

    for batch, z_noise, noise in batches:
        tasks = [*zip(*(x.double() for x in (*batch, z_noise, noise)))]
        zs, q_losses, kl = [], [], 0.0
        for s, a, r, next_s, terminated, context, z_eps, _ in tasks:
            z = context
            if agent.encoder:
                q_z = posterior(agent.encoder, context)
                kl = kl + kl_divergence(q_z, Normal(0.0, 1.0)).sum()
                z = q_z.mean + q_z.stddev * z_eps
            zs.append(z)
            z = z.expand(len(s), -1)
            with torch.no_grad():
                next_v = value(agent.target_v, next_s, z)
                y = args.reward_scale * r + args.gamma * (1 - terminated) * next_v
            q_losses.append(sum(((value(q, s, a, z) - y) ** 2).mean() for q in agent.q))
        q_loss = sum(q_losses) / len(tasks)
        learners = [agent.q, agent.encoder] if agent.encoder else [agent.q]
        parameters = itertools.chain(*(module.parameters() for module in learners))
        descend(q_loss + args.kl_weight * kl, parameters, rate)

        v_loss = policy_loss = 0.0
        for (s, *_, eps), z in zip(tasks, zs):
            z = z.detach()
            a, log_prob, mean2, log_std2 = policy(agent.policy.net, hyper, s, z, eps)
            z = z.expand(len(s), -1)
            y = torch.minimum(*(value(q, s, a, z) for q in agent.q)) - log_prob
            v_loss = v_loss + ((value(agent.v, s, z) - y.detach()) ** 2).mean() / len(tasks)
            regularisation = args.policy_reg * (mean2.mean() + log_std2.mean())
            policy_loss = policy_loss + (regularisation - y.mean()) / len(tasks)
        descend(v_loss, agent.v.parameters(), rate)
        descend(policy_loss, agent.policy.parameters(), rate)
        follow(agent.target_v, agent.v, args.tau)
    return agent
