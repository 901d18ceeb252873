"""The executor: config x model -> plan -> changed model. It reads the config file alone and never the analyzer."""
