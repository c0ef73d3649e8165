"""What to merge, how, and into what: recipes, their rules, and configurations of mergekit's."""
