//! Answers that can be fetched again and gone on from: in memory, as long as there is room.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::text::Message;

/// Most responses kept; the one not looked at for longest goes first.
const MOST: usize = 1000;
/// Most bytes of their text.
const MOST_BYTES: usize = 64 << 20;

/// A response with what led to it.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// The response object.
    pub(super) response: Value,
    /// The items of its request.
    pub(super) input: Vec<Value>,
    /// The conversation up to and with its answer, without instructions.
    pub(super) turns: Vec<Message>,
}

/// The responses kept. A restart forgets them.
#[derive(Default)]
pub(in crate::server) struct StoredResponses(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    by_id: HashMap<String, Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    stored: Arc<Stored>,
    bytes: usize,
    used: u64,
}

impl Stored {
    fn bytes(&self) -> usize {
        let turn = |turn: &Message| {
            turn.content.len()
                + turn.tool_calls.as_ref().map_or(0, |calls| calls.to_string().len())
                + size_of::<Message>()
        };
        let json = |value: &Value| value.to_string().len();
        json(&self.response) + self.input.iter().map(json).sum::<usize>() + self.turns.iter().map(turn).sum::<usize>()
    }
}

impl StoredResponses {
    fn locked<T>(&self, work: impl FnOnce(&mut Kept) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps one and lets go of the oldest where there are too many.
    pub(super) fn keep(&self, id: &str, stored: Stored) {
        self.keep_within(id, stored, MOST, MOST_BYTES);
    }

    fn keep_within(&self, id: &str, stored: Stored, most: usize, most_bytes: usize) {
        let bytes = stored.bytes();
        self.locked(|kept| {
            kept.clock += 1;
            kept.bytes += bytes;
            kept.by_id.insert(id.to_owned(), Entry { stored: Arc::new(stored), bytes, used: kept.clock });
            while kept.by_id.len() > most || kept.bytes > most_bytes {
                let oldest = kept.by_id.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone());
                let Some(gone) = oldest.and_then(|id| kept.by_id.remove(&id)) else { return };
                kept.bytes -= gone.bytes;
            }
        });
    }

    /// One of them.
    pub(super) fn get(&self, id: &str) -> Option<Arc<Stored>> {
        self.locked(|kept| {
            kept.clock += 1;
            let entry = kept.by_id.get_mut(id)?;
            entry.used = kept.clock;
            Some(entry.stored.clone())
        })
    }

    /// Forgets one; false where there is none.
    pub(super) fn forget(&self, id: &str) -> bool {
        self.locked(|kept| {
            let gone = kept.by_id.remove(id);
            kept.bytes -= gone.as_ref().map_or(0, |entry| entry.bytes);
            gone.is_some()
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_not_looked_at_for_longest_goes_first() {
        let store = StoredResponses::default();
        let one =
            |text: &str| Stored { response: json!(text), input: Vec::new(), turns: vec![Message::new("user", text)] };
        let keep = |id: &str| store.keep_within(id, one("x"), 2, usize::MAX);
        let there = || ["a", "b", "c"].map(|id| store.locked(|kept| kept.by_id.contains_key(id)));
        keep("a");
        keep("b");
        assert!(store.get("a").is_some());
        keep("c");
        assert_eq!(there(), [true, false, true]);
        assert!(store.forget("a") && !store.forget("a") && store.get("a").is_none());
        let room = one("x").bytes();
        store.keep_within("b", one("x"), 9, room);
        assert_eq!(there(), [false, true, false]);
        store.keep_within("a", one("xx"), 9, room);
        assert_eq!(
            (there(), store.locked(|kept| kept.bytes)),
            ([false; 3], 0),
            "what is larger than all room is not kept"
        );
    }
}
