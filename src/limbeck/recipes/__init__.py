"""The recipes that come with Limbeck: `limbeck ls recipes`."""
