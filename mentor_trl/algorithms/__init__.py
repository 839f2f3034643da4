"""The methods: who samples which row of a rollout batch, and what its tokens are worth."""
