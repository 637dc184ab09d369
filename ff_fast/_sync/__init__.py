"""The parts of the blocking shell, :mod:`ff_fast.client`."""
