//! Tests of the store.

#![allow(clippy::unwrap_used)]

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("deep/er/jobs.sqlite")).unwrap();
    (folder, store)
}

#[test]
fn a_job_survives_reopening() {
    let (folder, store) = store();
    let job = store.create(&json!({"seed": 7, "loss": {"beta": 0.1}})).unwrap();
    assert!(job.id.starts_with("rdpo-"));
    store.set_status(&job.id, Status::Synthesizing, None).unwrap();
    store.put_row(&job.id, "sample", 3, &json!({"n": 3})).unwrap();
    store.put_row(&job.id, "sample", 1, &json!("first")).unwrap();
    store.put_row(&job.id, "sample", 1, &json!("again")).unwrap();
    store.set_progress(&job.id, &json!({"synthesizing": {"done": 1, "total": 2}})).unwrap();
    store.set_progress(&job.id, &json!({"note": "x"})).unwrap();
    drop(store);

    let store = Store::open(&folder.path().join("deep/er/jobs.sqlite")).unwrap();
    let back = store.get(&job.id).unwrap();
    assert_eq!(back.status, Status::Synthesizing);
    assert_eq!(back.request, json!({"seed": 7, "loss": {"beta": 0.1}}));
    assert_eq!(back.progress, json!({"synthesizing": {"done": 1, "total": 2}, "note": "x"}));
    assert_eq!(store.rows(&job.id, "sample").unwrap(), [(1, json!("again")), (3, json!({"n": 3}))]);
    store.requeue_interrupted().unwrap();
    assert_eq!(store.get(&job.id).unwrap().status, Status::Queued);
    let said: Vec<String> = store.events(&job.id, 0, 100).unwrap().into_iter().map(|event| event.message).collect();
    assert_eq!(said, ["queued", "synthesizing", "queued again: the server stopped while synthesizing"]);
}

#[test]
fn rows_of_a_batch_are_one_change() {
    let (_folder, store) = store();
    let job = store.create(&json!({})).unwrap();
    store.put_row(&job.id, "pair", 1, &json!("old")).unwrap();
    let changes = store.watch();
    let before = *changes.borrow();
    let rows: Vec<(usize, Value)> = (0..300).map(|index| (index, json!({ "n": index }))).collect();
    store.put_rows(&job.id, "pair", &rows).unwrap();
    assert_eq!(*changes.borrow() - before, 1, "one transaction");
    assert_eq!(store.rows(&job.id, "pair").unwrap(), rows, "what was there is overwritten");
    store.put_rows(&job.id, "pair", &[]).unwrap();
    assert!(store.put_rows("rdpo-no", "pair", &rows).is_err(), "rows belong to a job");
    assert!(store.rows("rdpo-no", "pair").unwrap().is_empty());
}

#[test]
fn a_list_leaves_out_the_long_parts_and_nothing_else() {
    let (_folder, store) = store();
    let request = json!({
        "prompts": ["a"], "seed": u64::MAX, "least": i64::MIN, "pairs": [{"prompt": "p"}],
        "loss": {"beta": 0.1, "pairs": [1.0]}, "eval_prompts": ["e"],
        "numbers": [0.30000000000000004, 1e300, 1e-7, -0.0, 5e-324, 3.0],
        "metadata": {"prompts": "mine", "a.b": "q\"\\\u{0}\n🦀"},
    });
    let id = store.create(&request).unwrap().id;
    let result =
        json!({"adapter": {"version": 4}, "report": {"win_rate": 0.5, "samples": [1], "kl": 0.1}, "samples": 2});
    store.set_result(&id, &result).unwrap();
    let plain = store.create(&json!({"seed": 1})).unwrap();
    let listed = store.list(None, 5).unwrap().data;
    assert_eq!(listed[0], plain, "nothing is missed where nothing is long");
    let (mut request_left, mut result_left) = (request.clone(), result.clone());
    for part in ["prompts", "pairs", "eval_prompts"] {
        request_left.as_object_mut().unwrap().shift_remove(part);
    }
    result_left["report"].as_object_mut().unwrap().shift_remove("samples");
    // As text: the order of the fields and the bits of the numbers too.
    assert_eq!(listed[1].request.to_string(), request_left.to_string());
    assert_eq!(listed[1].result.to_string(), result_left.to_string());
    let whole = store.get(&id).unwrap();
    assert_eq!((&whole.request, &whole.result), (&request, &result));
}

#[test]
fn a_status_is_read_without_the_request() {
    let (_folder, store) = store();
    let id = store.create(&json!({})).unwrap().id;
    // What cannot be parsed is not looked at.
    store.lock().execute("update jobs set request = 'no JSON'", []).unwrap();
    assert!(store.get(&id).is_err());
    assert_eq!(store.status(&id).unwrap(), Status::Queued);
    assert_eq!(store.events(&id, 0, 10).unwrap().len(), 1);
    for error in [store.status("rdpo-no").unwrap_err(), store.events("rdpo-no", 0, 10).unwrap_err()] {
        assert_eq!((error.status(), error.param.as_deref()), (404, Some("id")));
    }
}

#[test]
fn a_refused_transition_changes_nothing() {
    let (_folder, store) = store();
    let job = store.create(&json!({})).unwrap();
    store.set_status(&job.id, Status::Training, None).unwrap();
    let error = store.set_status(&job.id, Status::Scoring, None).unwrap_err();
    assert_eq!(error.status(), 409);
    assert_eq!(store.get(&job.id).unwrap().status, Status::Training);
    assert_eq!(store.events(&job.id, 0, 100).unwrap().len(), 2);
    let failed = store.set_status(&job.id, Status::Failed, Some(json!({"message": "no luck"}))).unwrap();
    assert!(failed.finished_at.is_some() && failed.error.is_some());
    let queued = store.set_status(&job.id, Status::Queued, None).unwrap();
    assert!(queued.finished_at.is_none() && queued.error.is_none());
    assert_eq!(store.set_status("rdpo-no", Status::Failed, None).unwrap_err().status(), 404);
}

#[test]
fn pages_go_from_new_to_old() {
    let (_folder, store) = store();
    let ids: Vec<String> = (0..5).map(|n| store.create(&json!({ "n": n })).unwrap().id).collect();
    let first = store.list(None, 2).unwrap();
    assert_eq!(first.data.iter().map(|job| &job.id).collect::<Vec<_>>(), [&ids[4], &ids[3]]);
    assert!(first.has_more);
    let last = store.list(Some(&ids[2]), 2).unwrap();
    assert_eq!(last.data.iter().map(|job| &job.id).collect::<Vec<_>>(), [&ids[1], &ids[0]]);
    assert!(!last.has_more);
    assert_eq!(store.list(Some("rdpo-no"), 2).unwrap_err().param.as_deref(), Some("after"));
    assert_eq!(store.claim().unwrap().unwrap().id, ids[0], "the oldest is claimed");
}

#[test]
fn a_file_that_is_no_store_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sqlite");
    std::fs::write(&path, "this is no database, whatever its name says. ".repeat(100)).unwrap();
    let error = Store::open(&path).err().unwrap();
    assert!(error.message.contains("x.sqlite") && error.param.as_deref() == Some("store.path"), "{error}");
}

#[test]
fn a_full_disk_is_an_error_that_says_so() {
    let (_folder, store) = store();
    let job = store.create(&json!({})).unwrap();
    let pages: i64 = store.lock().query_row("pragma page_count", [], |row| row.get(0)).unwrap();
    store.lock().pragma_update(None, "max_page_count", pages).unwrap();
    let error = store.put_row(&job.id, "sample", 0, &json!("x".repeat(100_000))).unwrap_err();
    assert!(error.message.contains("disk is full"), "{error}");
    let rows: Vec<(usize, Value)> = (0..300).map(|index| (index, json!("x".repeat(1000)))).collect();
    assert!(store.put_rows(&job.id, "sample", &rows).is_err(), "all of a batch or none");
    assert_eq!(store.get(&job.id).unwrap().status, Status::Queued);
    assert!(store.rows(&job.id, "sample").unwrap().is_empty());
}
