"""Noise of differential privacy that the sites of a masked sum draw together (privacy.noise = "shared").

What a site sends is round((x_i + n_i) / g) with Gaussian n_i of deviation s and a grid g that is the same at all sites,
as `mechanism.released` makes it; only the sum of these whole numbers is opened.  Rounding before the sum is no loss: of
a real y the probability that round(y + n) = j is the density at j of y + n + u, with u uniform in [-1/2, 1/2] (in steps
of g).  Two densities of Gaussians, of deviations a and b, sampled at whole numbers and convolved, are the density of
their convolution at whole numbers up to a factor of 1 +- 2.1 exp(-2 pi^2 c^2), 1 / c^2 = 1 / a^2 + 1 / b^2, wherever
they stand (Poisson's summation, as for discrete Gaussians in arXiv:2102.06387), and a mixture over u keeps that factor.
So the sum of k such numbers has, up to the factors, the probabilities of round(sum of x_i + N(0, k s^2) + k - 1
uniforms), which is made of the answer of a Gaussian mechanism.  With s of `mechanism.GRID` steps or more a factor
differs from 1 by less than 1e-1000000, so the accountant is that of one Gaussian release of deviation s sqrt(k), and no
discrete mechanism (arXiv:2004.00010) is needed.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.privacy.accounting import noise_multiplier
from common.privacy.mechanism import grid_of
from common.privacy.people import num_groups_of
from common.settings import PrivacySettings

MOST_STEPS: Final = 2**23  # of the grid, of what a site adds before its noise


def fewest_noises(num_members: int, *, num_keys: int, threshold: int, colluding: int) -> int:
    """The fewest noises that nobody knows in any sum that a server can open; 0 or less: none is sure.

    num_members: sites that the sum is to be over.  num_keys: sites whose keys were handed out, num_members or more.
    threshold: shares that give a secret back.  colluding: sites that put what they know together with the server.

    An honest site shows shares of num_keys - threshold mask keys at most, as its one list holds threshold sites, and a
    key needs threshold shares, of which the colluding give theirs.  So by telling sites different lists a server takes
    (num_keys - colluding) (num_keys - threshold) / (threshold - colluding) honest sites out of a sum at most.
    """
    if 2 * threshold <= num_keys + colluding:  # then lists could be such that one site's words are opened alone
        return 0
    taken = (num_keys - colluding) * (num_keys - threshold) // (threshold - colluding)
    return num_members - colluding - taken


def sensitivity_of(privacy: PrivacySettings, *, num_people: int, share: float) -> float:
    """How far one person moves what a site adds to the sum: one group's change, from one of norm C to another.

    num_people: to train on, at the site.  share: of its change in the sum, in (0, 1].
    """
    return share * 2.0 * privacy.clip / num_groups_of(num_people, privacy.group_people)


def deviation_of_each(privacy: PrivacySettings, rounds: int, *, sensitivity: float, noises: int) -> float:
    """Of the noise that each site adds, so that `noises` of them are the whole run's noise for `sensitivity`."""
    return noise_multiplier(privacy.epsilon, privacy.delta, rounds) * sensitivity / math.sqrt(noises)


def within_words(total: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """A site's part of the sum before its noise, cut so that float32 and the words hold both to the last step.

    total: [size] float64; what is cut is thousands of times the noise, and to cut moves no two sums apart.
    deviation: of the site's noise.
    """
    most = MOST_STEPS * grid_of(deviation)
    return np.clip(total, -most, most)


def grid_of_sum(privacy: PrivacySettings, rounds: int, *, sensitivity: float, noises: int) -> float:
    """The step of the whole numbers that sites add, a power of two, the same at all of them and at the server."""
    return grid_of(deviation_of_each(privacy, rounds, sensitivity=sensitivity, noises=noises))
