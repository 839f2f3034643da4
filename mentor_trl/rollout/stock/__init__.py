"""Mixed rollouts on stock engines: the policy's samples up to a branch point, the expert's gives the token there."""
