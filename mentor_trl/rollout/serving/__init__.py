"""What every server of a policy needs, whatever samples on it: facts, weights, TRL's backend."""
