"""Pages and pictures: the reports of the demo and of the recipes, as files that load nothing from elsewhere."""
