//! Chat templates: the model's own Jinja source, run by minijinja with Python's string methods.

use std::sync::LazyLock;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use regex::{Captures, Regex};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The name a template has inside its environment.
const NAME: &str = "chat_template";
/// Steps a rendering may take: a template of a request must not loop for ever. The longest conversations take thousands.
const MOST_STEPS: u64 = 20_000_000;
/// Bytes it may write; four times the largest request.
const MOST_BYTES: usize = 128 << 20;
/// Put behind the turn that is to be gone on with, to find its end in what is rendered.
const END_OF_TURN: &str = "\u{e000}end of turn\u{e000}";
/// A mark's sign before, whether it is the end's, and the sign behind.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is constant. This is a bug.")
});
/// Widest `indent` of `tojson`.
const MOST_INDENT: usize = 32;

/// One turn, as the template sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// Text (parts already joined).
    pub content: String,
    /// Name of the speaker, if given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Tool calls of an assistant turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<serde_json::Value>,
    /// The call a tool turn answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A turn of `role` with `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), ..Message::default() }
    }
}

/// How to render.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// End with the header of an assistant turn.
    pub add_generation_prompt: bool,
    /// Leave the last turn open so that the model goes on with it.
    pub continue_final_message: bool,
    /// Tools passed to the template.
    pub tools: Option<serde_json::Value>,
    /// Extra template variables.
    pub kwargs: serde_json::Map<String, serde_json::Value>,
    /// Template source instead of the model's.
    pub template: Option<String>,
}

impl Default for RenderOptions {
    /// A prompt for generation.
    fn default() -> Self {
        RenderOptions {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            kwargs: serde_json::Map::new(),
            template: None,
        }
    }
}

/// A parsed template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    pub(super) fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        // Marks of the assistant's text for trainers: blocks without an effect of their own, but for the space around them.
        let source = GENERATION.replace_all(source, |mark: &Captures<'_>| {
            let word = if mark.get(2).is_some() { "endif" } else { "if true" };
            format!("{{%{} {word} {}%}}", &mark[1], &mark[3])
        });
        let source = source.into_owned();
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| Error::unprocessable(NAME, format!("the chat template does not parse: {error}")))?;
        Ok(ChatTemplate { environment })
    }

    pub(super) fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<String> {
        let fail = |error: minijinja::Error| {
            // The reason a template gives (`raise_exception`) is the error's detail.
            let reason = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Error::invalid("messages", format!("the chat template refuses the conversation: {reason}"))
        };
        let template = self.environment.get_template(NAME).map_err(fail)?;
        let mut marked = Vec::new();
        let messages = match messages.last() {
            Some(last) if options.continue_final_message => {
                marked.extend_from_slice(messages);
                let content = format!("{}{END_OF_TURN} ", last.content);
                marked[messages.len() - 1] = Message { content, ..last.clone() };
                &marked
            }
            _ => messages,
        };
        let mut rendered = Bounded(Vec::new());
        let kwargs = Value::from_serialize(&options.kwargs);
        let written = template.render_captured_to(
            context! {
                messages => messages,
                add_generation_prompt => options.add_generation_prompt && !options.continue_final_message,
                tools => options.tools,
                bos_token => bos_token.unwrap_or(""),
                eos_token => eos_token.unwrap_or(""),
                ..kwargs
            },
            &mut rendered,
        );
        written.map(drop).map_err(fail)?;
        let text = String::from_utf8(rendered.0).map_err(|error| Error::internal(error.to_string()))?;
        if !options.continue_final_message {
            return Ok(text);
        }
        let Some((before, after)) = text.rsplit_once(END_OF_TURN) else {
            let message = "the last message does not appear in the rendered conversation";
            return Err(Error::invalid("continue_final_message", message));
        };
        // A template that takes off the space behind the mark takes it off what a turn ends with.
        Ok(if after.starts_with(' ') { before } else { before.trim_end() }.to_owned())
    }
}

/// What a rendering writes, up to a limit.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_BYTES {
            return Err(std::io::Error::other("the rendered conversation is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Python's `json.dumps` as transformers sets it up: `, ` and `: ` between items, no HTML escapes, optional indent.
fn tojson(value: &Value, kwargs: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if indent.is_some_and(|width| width > MOST_INDENT) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("indent is more than {MOST_INDENT}")));
    }
    let json = serde_json::to_value(value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    write_json(&mut text, &json, indent, 0);
    Ok(Value::from_safe_string(text))
}

/// JSON the way Python's `json.dumps` spaces it.
pub(super) fn write_json(out: &mut String, json: &serde_json::Value, indent: Option<usize>, depth: usize) {
    let mut items = |open: char, close: char, parts: Vec<(Option<&String>, &serde_json::Value)>| {
        out.push(open);
        let empty = parts.is_empty();
        for (index, (key, value)) in parts.into_iter().enumerate() {
            if index > 0 {
                out.push_str(if indent.is_some() { "," } else { ", " });
            }
            if let Some(width) = indent {
                out.push('\n');
                out.push_str(&" ".repeat(width * (depth + 1)));
            }
            if let Some(key) = key {
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push_str(": ");
            }
            write_json(out, value, indent, depth + 1);
        }
        if let (Some(width), false) = (indent, empty) {
            out.push('\n');
            out.push_str(&" ".repeat(width * depth));
        }
        out.push(close);
    };
    match json {
        serde_json::Value::Array(list) => items('[', ']', list.iter().map(|value| (None, value)).collect()),
        serde_json::Value::Object(map) => items('{', '}', map.iter().map(|(key, value)| (Some(key), value)).collect()),
        plain => out.push_str(&plain.to_string()),
    }
}

/// Today's date by a strftime format, in UTC; the directives templates use.
fn strftime_now(format: &str) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    let name = MONTHS[month as usize - 1];
    [
        ("%Y", year.to_string()),
        ("%m", format!("{month:02}")),
        ("%d", format!("{day:02}")),
        ("%B", name.to_owned()),
        ("%b", name[..3].to_owned()),
        ("%H", format!("{:02}", seconds / 3600 % 24)),
        ("%M", format!("{:02}", seconds / 60 % 60)),
        ("%S", format!("{:02}", seconds % 60)),
    ]
    .iter()
    .fold(format.to_owned(), |text, (directive, value)| text.replace(directive, value))
}

/// Year, month and day of a count of days since 1970 (Gregorian calendar, years that begin in March).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, of_year - (153 * from_march + 2) / 5 + 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn render(source: &str, messages: &[Message], options: &RenderOptions) -> Result<String> {
        ChatTemplate::new(source)?.render(messages, options, Some("<s>"), Some("</s>"))
    }

    #[test]
    fn chatml_with_and_without_a_generation_prompt() {
        let messages = [Message::new("user", "Hi <b>\"you\"</b>"), Message::new("assistant", "Yes")];
        let closed = "<|im_start|>user\nHi <b>\"you\"</b><|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n";
        let no_prompt = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
        assert_eq!(render(CHATML, &messages, &no_prompt).unwrap(), closed);
        assert_eq!(
            render(CHATML, &messages, &RenderOptions::default()).unwrap(),
            format!("{closed}<|im_start|>assistant\n")
        );
        let open = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        assert_eq!(render(CHATML, &messages, &open).unwrap(), closed.trim_end_matches("<|im_end|>\n"));
    }

    #[test]
    fn the_turn_that_is_gone_on_with_is_left_as_it_was_given() {
        let open = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        let rendered = |source: &str, content: &str| {
            render(source, &[Message::new("user", "x"), Message::new("assistant", content)], &open)
        };
        for content in ["<", "|", "x", "def f():\n    ", ""] {
            let expected = format!("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{content}");
            assert_eq!(rendered(CHATML, content).unwrap(), expected);
        }
        let trims = CHATML.replace("message['content']", "message['content'] | trim");
        assert!(rendered(&trims, " a b \n").unwrap().ends_with("assistant\na b"));
        let error = rendered("{{ messages[0].content }}", "never shown").unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (400, Some("continue_final_message")));
    }

    #[test]
    fn a_refusal_is_a_400_with_the_templates_own_words() {
        let error = render(
            "{{ raise_exception('roles must alternate') }}",
            &[Message::new("user", "x")],
            &RenderOptions::default(),
        )
        .unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (400, Some("messages")));
        assert!(error.message.contains("roles must alternate"));
    }

    #[test]
    fn json_is_pythons() {
        let options = RenderOptions {
            tools: Some(serde_json::json!([{"name": "f<", "n": [1, 2]}, {}])),
            ..RenderOptions::default()
        };
        let text =
            render("{{ tools | tojson }}|{{ tools[0] | tojson(indent=2) }}", &[Message::new("user", "x")], &options)
                .unwrap();
        assert_eq!(
            text,
            "[{\"name\": \"f<\", \"n\": [1, 2]}, {}]|{\n  \"name\": \"f<\",\n  \"n\": [\n    1,\n    2\n  ]\n}"
        );
    }

    #[test]
    fn python_methods_and_dates() {
        let text = render(
            "{{ messages[0].content.strip().upper() }} {{ bos_token }}",
            &[Message::new("user", " a ")],
            &RenderOptions::default(),
        );
        assert_eq!(text.unwrap(), "A <s>");
        assert_eq!((civil(0), civil(11_016), civil(20_781)), ((1970, 1, 1), (2000, 2, 29), (2026, 11, 24)));
    }

    /// As jinja2 3.1 renders them with transformers' settings and extensions.
    #[test]
    fn trainers_marks_and_loop_controls() {
        let messages = [Message::new("assistant", "A"), Message::new("user", "B")];
        for (source, expected) in [
            (
                "{% for message in messages %}<{{ message['role'] }}>\n{% generation %}{{- message['content'] | trim }}<|eot_id|>{% endgeneration %}\n{% endfor %}",
                "<assistant>\nA<|eot_id|><user>\nB<|eot_id|>",
            ),
            (
                "{% for message in messages %}\n    {%generation-%}\n    {{ message['content'] }}\n    {%- endgeneration %}\n{% endfor %}|",
                "AB|",
            ),
            (
                "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ message['content'] }}{% endfor %}",
                "A",
            ),
        ] {
            assert_eq!(render(source, &messages, &RenderOptions::default()).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn a_template_that_writes_without_end_is_stopped() {
        for source in
            ["{{ messages | tojson(indent=99999999999) }}", "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}"]
        {
            let error = render(source, &[Message::new("user", "x")], &RenderOptions::default()).unwrap_err();
            assert_eq!(error.status(), 400, "{source}: {error}");
        }
    }

    #[test]
    fn a_template_that_loops_for_ever_is_stopped() {
        let source = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        let error = render(source, &[Message::new("user", "x")], &RenderOptions::default()).unwrap_err();
        assert_eq!(error.status(), 400, "{error}");
    }

    #[test]
    fn a_template_that_does_not_parse_is_named() {
        let error = ChatTemplate::new("{% for %}").err().unwrap();
        assert_eq!(error.param.as_deref(), Some("chat_template"));
    }
}
