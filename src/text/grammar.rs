//! Constrained output: what an answer may be, compiled against a tokenizer, and which token may come next.

use std::fmt;
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{ParserFactory, panic_utils};
use serde_json::{Value, json};

use super::Tokenizer;
use crate::error::{Code, Error, Result};

/// Most bytes that are looked ahead for in an answer.
const MOST_FORCED: usize = 4096;
/// Longest text of a schema, expression or grammar.
const MOST_BYTES: usize = 256 << 10;
/// Deepest brackets of a Lark grammar; JSON and expressions have limits of their own.
const MOST_DEPTH: usize = 100;
/// Rules that refer to rules are followed by recursion: what [`MOST_BYTES`] can hold needs more stack than a thread has.
const STACK_BYTES: usize = 64 << 20;
/// Between two tokens of JSON: a space, or a new line and its indent. Any run of spaces would be valid too, and a small model
/// that has nothing to say writes them without end.
const WHITESPACE: &str = r"\x20|\r?\n[\x20\t]{0,20}";
/// Most states one answer's lexer may have, at one or two kilobytes each; common schemas take hundreds.
const MOST_STATES: usize = 50_000;
/// Most characters of an error: the parser repeats what it was given.
const LONGEST_REASON: usize = 400;
/// A longer token is never allowed: the trie has no room for it.
const LONGEST_TOKEN: usize = 1000;

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// JSON that the schema allows.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// A match of the whole regular expression (Rust's syntax).
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of the grammar in Lark's form; `%json { … }` and special tokens such as `<|tool_call|>` may stand in it.
    Lark(String),
}

/// A compiled [`Constraint`]; shared by all answers to a request.
pub struct Grammar {
    constraint: Constraint,
    fresh: llguidance::Matcher,
}

impl Grammar {
    /// Compiles it, which takes from under a millisecond to about a second (the first one for a tokenizer also sorts the
    /// vocabulary): not for a thread that answers. What cannot be compiled is a 400 without a field; the caller knows the field.
    pub fn compile(tokenizer: &Tokenizer, constraint: Constraint) -> Result<Self> {
        let source = source(&constraint)?;
        let factory = tokenizer.grammar_factory()?;
        let compile = || {
            let parser = panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| factory.create_parser(source)));
            let mut fresh = llguidance::Matcher::new(parser);
            // A form that nothing has, such as a reference to itself, shows at the first token.
            let empty = fresh.compute_mask_or_eos().is_ok_and(|mask| mask.is_zero());
            match fresh.get_error() {
                Some(error) if !error.starts_with("NoExtension") => Err(invalid(&error)),
                error if empty || error.is_some() => Err(invalid("no text has this form")),
                _ => Ok(fresh),
            }
        };
        let fresh = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, compile)?;
            thread.join().unwrap_or_else(|_| Err(Error::internal("compiling the grammar panicked. This is a bug.")))
        })?;
        Ok(Grammar { constraint, fresh })
    }

    /// The state of one answer, at its beginning.
    pub fn matcher(&self) -> Matcher {
        // Deep: the states of answers are used on different threads and would wait for each other's lock.
        Matcher { inner: self.fresh.deep_clone(), is_blind: false }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.constraint.fmt(f)
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        self.constraint == other.constraint
    }
}

/// Where one answer stands in its grammar.
pub struct Matcher {
    inner: llguidance::Matcher,
    /// Looking ahead is not for this answer.
    is_blind: bool,
}

impl Matcher {
    /// A matcher at the same place that moves on its own.
    pub fn fork(&self) -> Self {
        Matcher { inner: self.inner.deep_clone(), is_blind: self.is_blind }
    }

    /// Which tokens may come next.
    pub fn mask(&mut self) -> Result<TokenMask> {
        self.inner.compute_mask_or_eos().map(TokenMask).map_err(|error| invalid(&error.to_string()))
    }

    /// Takes the next token, which the mask allowed.
    pub fn commit(&mut self, id: u32) -> Result<()> {
        self.inner.consume_token(id).map_err(|error| invalid(&error.to_string()))
    }

    /// What must be written next, in whatever tokens; nothing where there is a choice. `output` is what `grammar` has taken so far.
    pub fn forced(&mut self, grammar: &Grammar, output: &[u32]) -> Vec<u8> {
        if self.is_blind {
            return Vec::new();
        }
        let forced = self.inner.compute_ff_bytes();
        // Looking moves the parser. A special token that is forced is then in it as a text (0xFF and its number), which no token
        // writes, and a long text uses up the parser's limits: this answer goes on without looking.
        if forced.contains(&0xff) || forced.len() > MOST_FORCED || self.inner.get_error().is_some() {
            *self = Matcher { is_blind: true, ..grammar.matcher() };
            // What it took before it takes again; what it does not, the next mask says.
            let _ = output.iter().try_for_each(|id| self.commit(*id));
            return Vec::new();
        }
        forced
    }

    /// Whether the text so far could be the whole.
    pub fn is_accepting(&mut self) -> bool {
        self.inner.is_accepting().unwrap_or(false)
    }

    /// Whether nothing may follow.
    pub fn is_complete(&self) -> bool {
        self.inner.is_stopped()
    }
}

/// Tokens that may come next.
pub struct TokenMask(SimpleVob);

impl TokenMask {
    /// Whether it allows the token.
    pub fn allows(&self, id: u32) -> bool {
        (id as usize) < self.0.len() && self.0.is_allowed(id)
    }

    /// A bit for each of `count` tokens, the lowest of a word first: which it allows.
    pub fn words(&self, count: usize) -> Vec<u32> {
        let known = self.0.len().min(count);
        let mut words = self.0.as_slice()[..known.div_ceil(32)].to_vec();
        if !known.is_multiple_of(32)
            && let Some(last) = words.last_mut()
        {
            *last &= (1 << (known % 32)) - 1;
        }
        words.resize(count.div_ceil(32), 0);
        words
    }

    /// Makes the logits of all other tokens minus infinity.
    pub fn apply(&self, logits: &mut [f32]) {
        let known = self.0.len().min(logits.len());
        // Ids beyond the vocabulary are the padding of the model's matrices.
        logits[known..].fill(f32::NEG_INFINITY);
        self.0.iter_unset_entries(|id| {
            if id < known {
                logits[id] = f32::NEG_INFINITY;
            }
        });
    }
}

/// The schema with what may stand between tokens.
pub(super) fn spaced(schema: &Value) -> Result<Value> {
    let mut schema = match schema {
        Value::Object(fields) => fields.clone(),
        Value::Bool(true) => serde_json::Map::new(),
        _ => return Err(invalid("a JSON schema is an object")),
    };
    schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": WHITESPACE}));
    Ok(Value::Object(schema))
}

/// The parser's form of a constraint.
fn source(constraint: &Constraint) -> Result<TopLevelGrammar> {
    let bounded = |text: &str| {
        if text.len() <= MOST_BYTES {
            return Ok(());
        }
        Err(invalid(&format!("it has {} bytes, at most {MOST_BYTES} are read", text.len())))
    };
    match constraint {
        Constraint::JsonSchema(schema) => {
            bounded(&schema.to_string())?;
            Ok(TopLevelGrammar::from_json_schema(spaced(schema)?))
        }
        Constraint::JsonObject => source(&Constraint::JsonSchema(json!({"type": "object"}))),
        Constraint::Regex(expression) => {
            bounded(expression)?;
            if expression.is_empty() {
                return Err(invalid("the expression is empty"));
            }
            Ok(TopLevelGrammar::from_regex(expression))
        }
        Constraint::Choice(texts) => {
            if texts.is_empty() || texts.iter().any(String::is_empty) {
                return Err(invalid("it needs at least one text, and none may be empty"));
            }
            let texts: Vec<String> = texts.iter().map(|text| regex::escape(text)).collect();
            source(&Constraint::Regex(format!("(?:{})", texts.join("|"))))
        }
        Constraint::Lark(grammar) => {
            bounded(grammar)?;
            if grammar.contains("::=") {
                return Err(invalid(
                    "it is in GBNF's form (`::=`); this server reads Lark's: `start: \"yes\" | \"no\"`",
                ));
            }
            if deepest(grammar) > MOST_DEPTH {
                return Err(invalid(&format!("its brackets are more than {MOST_DEPTH} deep")));
            }
            Ok(TopLevelGrammar::from_lark(grammar.clone()))
        }
    }
}

/// How deep the brackets of a text are, those in strings included.
fn deepest(text: &str) -> usize {
    let (mut depth, mut most) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// A 400 with what the parser says, without its own state; of a long one the beginning and the end.
fn invalid(message: &str) -> Error {
    let end = ["\n<", "<state>", "<non-verbose/>"].iter().filter_map(|mark| message.find(mark)).min();
    let message = message[..end.unwrap_or(message.len())].trim();
    let text: Vec<char> = message.chars().collect();
    let half = LONGEST_REASON / 2;
    if text.len() <= LONGEST_REASON {
        return Error::new(Code::InvalidValue, message);
    }
    let parts = [&text[..half], &['…'], &text[text.len() - half..]];
    Error::new(Code::InvalidValue, parts.concat().into_iter().collect::<String>())
}

/// Compiles grammars for one tokenizer.
pub(super) fn factory(tokenizer: &Tokenizer) -> Result<ParserFactory> {
    let words: Vec<Vec<u8>> = (0..tokenizer.id_limit()).map(|id| word(tokenizer, id)).collect();
    let eos: Vec<u32> = tokenizer.eos_token_ids().iter().copied().filter(|id| (*id as usize) < words.len()).collect();
    let info = TokRxInfo::new(words.len() as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
    let trie = TokTrie::from(&info, &words);
    let trie = if eos.is_empty() { trie } else { trie.with_eos_tokens(&eos) };
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new(
        &environment,
        InferenceCapabilities::default(),
        &llguidance::earley::SlicedBiasComputer::general_slices(),
    )
    .map_err(|error| Error::internal(error.to_string()))?;
    factory.quiet();
    *factory.limits_mut() =
        ParserLimits { max_lexer_states: MOST_STATES, verbose_errors: false, ..ParserLimits::default() };
    Ok(factory)
}

/// The bytes a token writes, marked where it is a control token; nothing where it may never be written.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let mut bytes = tokenizer.token_bytes(id);
    if bytes.len() > LONGEST_TOKEN || bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) {
        return Vec::new();
    }
    if tokenizer.is_special(id) || tokenizer.eos_token_ids().contains(&id) {
        bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
    }
    bytes
}
