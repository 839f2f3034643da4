"""What a run says of itself: model card, recipe, and what goes to the Hub."""
