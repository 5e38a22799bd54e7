"""How the network learns: the loop, the step, the state of a run, its log and the optimizer."""
