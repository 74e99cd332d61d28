"""The mathematics of fields: derivatives, networks, penalties, likelihoods, and the loop that fits them."""

from neurst.core import rules  # registers the Taylor rules with neurst.core.jet
