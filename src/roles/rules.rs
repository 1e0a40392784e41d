//! A rules reward: weighted terms over the response, deterministic.

use regex::Regex;

use super::RuleOptions;
use crate::error::{Error, Result};

/// One checked term.
pub(super) enum Rule {
    Length { weight: f64, per: f64 },
    Regex { weight: f64, pattern: Regex },
    Contains { weight: f64, text: String },
    JsonValid { weight: f64 },
}

impl Rule {
    /// Checks the term at `index`; errors name its field.
    pub(super) fn new(index: usize, options: &RuleOptions) -> Result<Self> {
        let field = |key: &str| format!("roles.reward.terms[{index}].{key}");
        let finite = |weight: f64| match weight.is_finite() {
            true => Ok(weight),
            false => Err(Error::invalid(field("weight"), "must be a finite number")),
        };
        Ok(match options {
            RuleOptions::Length { weight, per } if per.is_finite() && *per > 0.0 => {
                Rule::Length { weight: finite(*weight)?, per: *per }
            }
            RuleOptions::Length { .. } => return Err(Error::invalid(field("per"), "must be above 0")),
            RuleOptions::Regex { weight, pattern } => Rule::Regex {
                weight: finite(*weight)?,
                pattern: Regex::new(pattern).map_err(|error| Error::invalid(field("pattern"), error.to_string()))?,
            },
            RuleOptions::Contains { text, .. } if text.is_empty() => {
                return Err(Error::invalid(field("text"), "must not be empty"));
            }
            RuleOptions::Contains { weight, text } => {
                Rule::Contains { weight: finite(*weight)?, text: text.to_lowercase() }
            }
            RuleOptions::JsonValid { weight } => Rule::JsonValid { weight: finite(*weight)? },
        })
    }

    /// What the term gives for a response.
    pub(super) fn score(&self, response: &str) -> f64 {
        let one = |holds: bool| if holds { 1.0 } else { 0.0 };
        match self {
            Rule::Length { weight, per } => weight * response.chars().count() as f64 / per,
            Rule::Regex { weight, pattern } => weight * one(pattern.is_match(response)),
            Rule::Contains { weight, text } => weight * one(response.to_lowercase().contains(text)),
            Rule::JsonValid { weight } => {
                weight * one(serde_json::from_str::<serde::de::IgnoredAny>(response.trim()).is_ok())
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn terms() {
        let terms: Vec<RuleOptions> = serde_json::from_value(serde_json::json!([
            {"check": "length", "weight": -1.0, "per": 10.0},
            {"check": "regex", "weight": 2.0, "pattern": r"^\d+$"},
            {"check": "contains", "weight": 4.0, "text": "SORRY"},
            {"check": "json_valid", "weight": 8.0},
        ]))
        .unwrap();
        let rules: Vec<Rule> = terms.iter().enumerate().map(|(i, term)| Rule::new(i, term).unwrap()).collect();
        let score = |text: &str| rules.iter().map(|rule| rule.score(text)).sum::<f64>();
        assert_eq!(score("12345"), -0.5 + 2.0 + 8.0);
        assert_eq!(score("I'm Sorry."), -1.0 + 4.0);
        assert_eq!(score(""), 0.0);
    }

    #[test]
    fn a_bad_term_names_its_field() {
        let bad = RuleOptions::Regex { weight: 1.0, pattern: "(".into() };
        assert_eq!(Rule::new(3, &bad).err().unwrap().param.as_deref(), Some("roles.reward.terms[3].pattern"));
    }
}
