"""From prompts to preferences: `notus sample`, `notus rate`, and rounds of both with training, `notus iterate`."""
