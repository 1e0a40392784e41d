//! Constrained output: masks on the tiny tokenizers and the real one, and whole answers of the engine under a grammar.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rdpo::engine::{EngineOptions, FinishReason, SamplingParams};
use rdpo::text::{Constraint, Grammar, Tokenizer, TokenizerOptions};
use serde_json::{Value, json};

use super::engine::{Answer, answer, options, pool_of, request, run, start};
use super::real_model;

const REAL: &str = "the real model's, from its GGUF file";

/// Byte-level, sentencepiece-like and GGUF vocabularies.
fn tokenizers() -> Vec<(&'static str, Arc<Tokenizer>)> {
    let mut all: Vec<_> =
        ["llama", "gemma3"].into_iter().map(|name| (name, start(name, options()).tokenizer().clone())).collect();
    all.push((REAL, Arc::new(real_model::tokenizer())));
    all.push(("sentencepiece", Arc::new(sentencepiece())));
    all
}

/// Bytes as `<0x0A>` and spaces as `▁`, in the form a GGUF file's vocabulary of that kind is read into.
fn sentencepiece() -> Tokenizer {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["▁", "▁\"", "\":", "▁small", "size", "true", "▁▁▁", "{\""].map(String::from);
    let tokens: Vec<String> =
        ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes).chain(pieces).collect();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "fuse_unk": true, "unk_token": "<unk>"},
    });
    Tokenizer::new(TokenizerOptions {
        tokenizer_json: json.to_string(),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        add_bos_token: true,
        eos_token_ids: vec![2],
        ..TokenizerOptions::default()
    })
    .unwrap()
}

fn order() -> Constraint {
    Constraint::JsonSchema(json!({
        "type": "object",
        "properties": {
            "size": {"enum": ["small", "large"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 12},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            "where": {"$ref": "#/$defs/place"},
        },
        "required": ["size", "count", "tags", "where"],
        "additionalProperties": false,
        "$defs": {"place": {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}$"}},
            "required": ["code"], "additionalProperties": false}},
    }))
}

fn is_order(text: &str) -> bool {
    let Ok(order) = serde_json::from_str::<Value>(text) else { return false };
    let tags = order["tags"].as_array().map_or(0, Vec::len);
    ["small", "large"].map(Value::from).contains(&order["size"])
        && (1..=12).contains(&order["count"].as_u64().unwrap_or(0))
        && (1..=3).contains(&tags)
        && order["where"]["code"].as_str().is_some_and(|code| code.len() == 2 && code == code.to_uppercase())
        && order.as_object().unwrap().len() == 4
}

fn lark(text: &str) -> Constraint {
    Constraint::Lark(text.into())
}

/// Whether the tokens of `text` may be written one after the other, and the text may end there.
fn takes(tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> bool {
    let mut matcher = grammar.matcher();
    for id in text.bytes().map(|byte| byte_token(tokenizer, byte)) {
        if matcher.is_complete() || !matcher.mask().unwrap().allows(id) {
            return false;
        }
        matcher.commit(id).unwrap();
    }
    matcher.is_complete() || matcher.is_accepting()
}

/// The token that writes one byte; every tokenizer of these tests has them for ASCII.
fn byte_token(tokenizer: &Tokenizer, byte: u8) -> u32 {
    let bytes = [byte];
    (0..tokenizer.vocab_size() as u32).find(|id| tokenizer.token_bytes(*id) == bytes).unwrap()
}

#[test]
fn a_grammar_takes_what_it_should_and_nothing_else() {
    let good = r#"{"size": "small", "count": 12, "tags": [true, false], "where": {"code": "NL"}}"#;
    let cases: [(Constraint, &[&str], &[&str]); 6] = [
        (
            order(),
            &[good, &good.replace(' ', ""), &good.replace(", ", ",\n    ")],
            &[
                "{}",
                "[]",
                &good.replace("12", "13"),
                &good.replace("small", "tiny"),
                &good.replace("NL", "nl"),
                &good.replace("true, false", ""),
                &good.replace(": 12", ":          12"),
                &good[..good.len() - 1],
            ],
        ),
        (
            Constraint::JsonObject,
            &["{}", r#"{"a": [1, {"b": null}], "c": "d"}"#],
            &["[]", "1", "{", "{}}", "{\n\n\n\n}"],
        ),
        (Constraint::Regex(r"\d{3}-[a-c]+/\w".into()), &["123-abc/x", "000-a/_"], &["12-a/x", "123-d/x", "123-a"]),
        (
            Constraint::Choice(vec!["yes".into(), "no (never)".into()]),
            &["yes", "no (never)"],
            &["no", "yes!", "(never)"],
        ),
        (lark("start: \"a\" list\nlist: \"(\" list \")\" | \"b\""), &["ab", "a((b))"], &["a", "a((b)", "b"]),
        (
            lark(
                "start: \"<f>\" args \"</f>\"\nargs: %json {\"type\": \"object\", \"properties\": {\"x\": {\"type\": \"integer\"}}, \"required\": [\"x\"], \"additionalProperties\": false}",
            ),
            &["<f>{\"x\": 3}</f>"],
            &["<f></f>", "<f>{\"x\": 3}", "<f>{\"x\": \"3\"}</f>"],
        ),
    ];
    for (name, tokenizer) in tokenizers() {
        for (constraint, right, wrong) in &cases {
            let grammar = Grammar::compile(&tokenizer, constraint.clone()).unwrap();
            for text in *right {
                assert!(takes(&tokenizer, &grammar, text), "{name}: {constraint:?} takes {text}");
            }
            for text in *wrong {
                assert!(!takes(&tokenizer, &grammar, text), "{name}: {constraint:?} refuses {text}");
            }
        }
    }
}

#[test]
fn any_walk_over_allowed_tokens_ends_in_what_was_asked_for() {
    for (name, tokenizer) in tokenizers() {
        let grammar = Grammar::compile(&tokenizer, order()).unwrap();
        for seed in 0..8 {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let (mut matcher, mut ids) = (grammar.matcher(), Vec::new());
            while !matcher.is_complete() {
                let mask = matcher.mask().unwrap();
                let allowed: Vec<u32> = (0..tokenizer.vocab_size() as u32).filter(|id| mask.allows(*id)).collect();
                assert!(!allowed.is_empty(), "{name}: stuck after {ids:?}");
                let id = allowed[rng.random_range(0..allowed.len())];
                assert!(!tokenizer.is_special(id) || matcher.is_accepting(), "{name}: control tokens are no text");
                matcher.commit(id).unwrap();
                ids.push(id);
                assert!(ids.len() < 500, "{name}: no end");
            }
            let text = tokenizer.decode(&ids, true).unwrap();
            assert!(is_order(&text), "{name}: {text}");
        }
    }
}

#[test]
fn what_cannot_be_compiled_says_why() {
    let tokenizer = real_model::tokenizer();
    let schema = |schema: Value| Constraint::JsonSchema(schema);
    for (constraint, word) in [
        (schema(json!({"type": "object", "if": {"required": ["a"]}, "then": {}})), "if"),
        (schema(json!({"type": "strin"})), "strin"),
        (schema(json!({"$ref": "https://example.org/schema"})), "example.org"),
        (schema(json!({"type": "integer", "minimum": 3, "maximum": 1})), "minimum"),
        (schema(json!(3)), "object"),
        (schema(json!(false)), "object"),
        (Constraint::Regex("(a".into()), "unclosed"),
        (Constraint::Regex("".into()), "empty"),
        (Constraint::Regex("a(?=b)".into()), "look"),
        (Constraint::Choice(Vec::new()), "at least one"),
        (Constraint::Choice(vec!["a".into(), String::new()]), "empty"),
        (lark("start: thing"), "thing"),
        (lark("root ::= \"a\""), "GBNF"),
        (lark(""), "start"),
        (schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})), "no text"),
        (Constraint::Regex("a[b&&c]".into()), "no text"),
    ] {
        let error = Grammar::compile(&tokenizer, constraint.clone()).expect_err(&format!("{constraint:?}"));
        assert_eq!(error.status(), 400, "{error}");
        assert!(error.message.contains(word) && !error.message.contains("<state>"), "{constraint:?}: {error}");
        assert!(error.message.len() < 400, "{error}");
    }
}

/// What would take for ever, or more memory or stack than there is, is refused or compiled soon.
#[test]
fn hostile_grammars_are_bounded() {
    let tokenizer = real_model::tokenizer();
    let _ = Grammar::compile(&tokenizer, Constraint::JsonObject).unwrap();
    let chain: serde_json::Map<String, Value> =
        (0..8000).map(|at| (format!("d{at}"), json!({"$ref": format!("#/$defs/d{}", (at + 1) % 8000)}))).collect();
    let lists =
        (0..100).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner, "maxItems": 1000}));
    let rules: String = (0..18_000).map(|at| format!("r{at}: r{}\n", at + 1)).collect();
    for (what, constraint) in [
        ("a chain of references", Constraint::JsonSchema(json!({"$ref": "#/$defs/d0", "$defs": chain}))),
        (
            "a circle of references",
            Constraint::JsonSchema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        ),
        ("deep lists", Constraint::JsonSchema(lists)),
        (
            "a long list",
            Constraint::JsonSchema(
                json!({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000u64}),
            ),
        ),
        ("a long text", Constraint::JsonSchema(json!({"type": "string", "minLength": 1_000_000_000u64}))),
        ("many words", Constraint::Choice((0..20_000).map(|at| format!("word {at}")).collect())),
        ("states without end", Constraint::Regex("[ab]*a[ab]{30}c".into())),
        ("words that overlap", Constraint::Regex("(.*the.*){1,40}(.*of.*){1,40}end".into())),
        ("counted counts", Constraint::Regex("(((a{1,1000}){1,1000}){1,1000}b){1,1000}".into())),
        ("a large class counted", Constraint::Regex(r"(\w{1,500}\W{1,500}){1,500}".into())),
        ("deep groups", Constraint::Regex(["(".repeat(50_000), ")".repeat(50_000)].join("a"))),
        ("deep brackets", lark(&format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000)))),
        ("a chain of rules", lark(&format!("start: r0\n{rules}r18000: \"a\""))),
        ("too much", Constraint::Regex("a".repeat(300_000))),
    ] {
        let began = Instant::now();
        let compiled = Grammar::compile(&tokenizer, constraint);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(5), "{what} took {took:?}");
        match compiled {
            Ok(grammar) => {
                let slowest = wander(&tokenizer, &grammar, 40);
                assert!(slowest < Duration::from_secs(1), "{what}: {slowest:?} for one token");
            }
            Err(error) => assert!(error.status() == 400 && error.message.len() < 600, "{what}: {error}"),
        }
    }
}

/// A walk over allowed tokens, which a limit may end; the longest that one token took.
fn wander(tokenizer: &Tokenizer, grammar: &Grammar, steps: usize) -> Duration {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let (mut matcher, mut slowest) = (grammar.matcher(), Duration::ZERO);
    for _ in 0..steps {
        let began = Instant::now();
        let Ok(mask) = matcher.mask() else { break };
        slowest = slowest.max(began.elapsed());
        let allowed: Vec<u32> = (0..tokenizer.vocab_size() as u32).filter(|id| mask.allows(*id)).collect();
        let Some(id) = allowed.get(rng.random_range(0..allowed.len().max(1))) else { break };
        if matcher.commit(*id).is_err() || matcher.is_complete() {
            break;
        }
    }
    slowest
}

fn under(tokenizer: &Tokenizer, constraint: Constraint, seed: u64) -> SamplingParams {
    let grammar = Some(Arc::new(Grammar::compile(tokenizer, constraint).unwrap()));
    // Random weights may like nothing better than spaces.
    let logit_bias = [(byte_token(tokenizer, b' '), -100.0)].into();
    SamplingParams { grammar, logit_bias, seed: Some(seed), max_tokens: Some(180), ..SamplingParams::default() }
}

const STOP: FinishReason = FinishReason::Stop { text: None, token: None };

#[test]
fn answers_of_random_weights_are_what_was_asked_for() {
    for name in ["llama", "gemma3"] {
        let engine = start(name, options());
        let tokenizer = engine.tokenizer().clone();
        for seed in 0..3 {
            for ignore_eos in [false, true] {
                let params = SamplingParams { ignore_eos, ..under(&tokenizer, order(), seed) };
                let found = run(&engine, request(&[3, 4, 5], params));
                assert!(is_order(&found.text) && found.reason == Some(STOP), "{name}: {found:?}");
            }
            // More is asked for than the grammar has: it ends the text.
            let params =
                SamplingParams { min_tokens: 50, ..under(&tokenizer, Constraint::Choice(vec!["yes".into()]), seed) };
            assert_eq!(run(&engine, request(&[3, 4, 5], params)).text, "yes");
        }
        let params = SamplingParams { max_tokens: Some(4), ..under(&tokenizer, order(), 0) };
        let cut = run(&engine, request(&[3, 4, 5], params));
        assert_eq!((cut.ids.len(), cut.reason), (4, Some(FinishReason::Length)));
        // Nothing that the list has is allowed.
        let params = SamplingParams {
            allowed_token_ids: Some(vec![byte_token(&tokenizer, b'x')]),
            ..under(&tokenizer, order(), 0)
        };
        let mut stream = engine.submit(request(&[3, 4, 5], params)).unwrap();
        match stream.blocking_recv().unwrap() {
            rdpo::engine::Event::Failed(error) => assert_eq!(error.status(), 400),
            other => panic!("{other:?}"),
        }
    }
}

/// The grammar's state is the answer's: other answers, and being put back for want of blocks, do not change it.
#[test]
fn company_and_preemption_do_not_change_a_constrained_answer() {
    let alone: Vec<Answer> = {
        let engine = start("llama", options());
        let params = |seed| under(engine.tokenizer(), order(), seed);
        (0..6).map(|seed| run(&engine, request(&[3, 4, 5], params(seed)))).collect()
    };
    let engine = start("llama", EngineOptions { kv_memory_bytes: pool_of(60), ..options() });
    let preempted = || rdpo::telemetry::metrics().preemptions_total.get();
    let before = preempted();
    // Compiled first: the answers have to run at once.
    let requests: Vec<_> = (0..6).map(|seed| request(&[3, 4, 5], under(engine.tokenizer(), order(), seed))).collect();
    let streams: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let together: Vec<Answer> = streams.into_iter().map(answer).collect();
    for (alone, together) in alone.iter().zip(&together) {
        assert_eq!((&alone.ids, &alone.reason), (&together.ids, &together.reason));
        assert!(is_order(&together.text));
    }
    assert!(preempted() > before, "the pool was meant to be too small");
}
