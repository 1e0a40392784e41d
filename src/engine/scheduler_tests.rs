//! The scheduler alone: fairness, sharing, preemption, and that no block is ever lost.

use proptest::prelude::*;

use super::*;

fn scheduler(num_blocks: usize, max_batch_tokens: usize) -> Scheduler {
    Scheduler::new(Limits { max_batch_tokens, max_sequences: 4, block_size: 4, prefix_caching: true }, num_blocks)
}

fn check(scheduler: &Scheduler) {
    let held: Vec<Vec<u32>> = scheduler.running.iter().map(|sequence| sequence.blocks.clone()).collect();
    scheduler.blocks.check_integrity(&held);
}

#[test]
fn prompts_are_cut_into_chunks_and_decoding_comes_first() {
    let mut scheduler = scheduler(16, 6);
    scheduler.add(Sequence::new(1, vec![7; 3], None, true));
    scheduler.add(Sequence::new(2, vec![8; 8], None, true));
    let step = scheduler.schedule();
    assert_eq!(step, [Scheduled { id: 1, len: 3 }, Scheduled { id: 2, len: 3 }]);
    scheduler.complete(&step);
    scheduler.push_token(1, 9);
    assert_eq!(scheduler.schedule(), [Scheduled { id: 1, len: 1 }, Scheduled { id: 2, len: 5 }]);
}

#[test]
fn rows_of_one_adapter_stand_together() {
    let mut scheduler = scheduler(16, 64);
    for (id, adapter) in [(1, None), (2, Some("x")), (3, None)] {
        scheduler.add(Sequence::new(id, vec![1; 3], adapter.map(str::to_owned), true));
    }
    let ids: Vec<u64> = scheduler.schedule().iter().map(|scheduled| scheduled.id).collect();
    assert_eq!(ids, [1, 3, 2]);
}

#[test]
fn a_prompt_as_long_as_the_pool_is_admitted() {
    let mut scheduler = scheduler(2, 64);
    scheduler.add(Sequence::new(1, vec![1; 8], None, true));
    assert_eq!(scheduler.schedule(), [Scheduled { id: 1, len: 8 }]);
}

/// Runs the scheduler to the end, one token an answer; returns the ids in the order they began and the tokens computed.
fn drain(scheduler: &mut Scheduler) -> (Vec<u64>, usize) {
    let (mut began, mut computed) = (Vec::new(), 0);
    while !scheduler.is_idle() {
        let step = scheduler.schedule();
        assert!(!step.is_empty(), "a step always makes progress");
        scheduler.complete(&step);
        for scheduled in &step {
            computed += scheduled.len;
            if !began.contains(&scheduled.id) {
                began.push(scheduled.id);
            }
            if scheduler.get(scheduled.id).unwrap().pending() == 0 {
                scheduler.remove(scheduled.id);
            }
        }
        check(scheduler);
    }
    (began, computed)
}

#[test]
fn answers_to_one_prompt_compute_its_full_blocks_once() {
    for (len, alone, each) in [(3, 3, 3), (4, 4, 4), (5, 5, 1), (10, 10, 2), (12, 12, 4)] {
        let mut scheduler = scheduler(64, 8);
        for id in 0..4 {
            scheduler.add(Sequence::new(id, vec![5; len], None, true));
        }
        // Another adapter's blocks are of no use.
        scheduler.add(Sequence::new(4, vec![5; len], Some("x".into()), true));
        let (_, computed) = drain(&mut scheduler);
        assert_eq!(computed, 2 * alone + 3 * each, "a prompt of {len} tokens in blocks of 4");
    }
}

#[test]
fn who_waits_for_blocks_holds_up_nobody() {
    let mut scheduler = scheduler(64, 16);
    for (id, prompt) in [(1, vec![5; 10]), (2, vec![5; 10]), (3, vec![6; 3])] {
        scheduler.add(Sequence::new(id, prompt, None, true));
    }
    assert_eq!(drain(&mut scheduler).0, [1, 3, 2]);
}

#[test]
fn what_the_cache_has_is_not_waited_for() {
    let mut scheduler = scheduler(64, 16);
    scheduler.add(Sequence::new(1, vec![5; 10], None, true));
    drain(&mut scheduler);
    // The first reads its whole prompt again, for its log-probs; the second has its two blocks, the third wants one more than there are.
    scheduler.add(Sequence { reusable: 0, ..Sequence::new(2, vec![5; 14], None, true) });
    scheduler.add(Sequence::new(3, vec![5; 10], None, true));
    scheduler.add(Sequence::new(4, vec![5; 14], None, true));
    let ids = |step: &[Scheduled]| step.iter().map(|scheduled| scheduled.id).collect::<Vec<_>>();
    let step = scheduler.schedule();
    assert_eq!(ids(&step), [2, 3]);
    check(&scheduler);
}

#[test]
fn lower_priority_goes_first_and_is_put_back_last() {
    let mut scheduler = scheduler(4, 64);
    for (id, priority) in [(1, 0), (2, 5), (3, -1), (4, 0)] {
        scheduler.add(Sequence { priority, ..Sequence::new(id, vec![id as u32; 7], None, true) });
    }
    let step = scheduler.schedule();
    assert_eq!(step.iter().map(|scheduled| scheduled.id).collect::<Vec<_>>(), [3, 1], "two fit");
    scheduler.complete(&step);
    // The pool is full and both need a third block; the one that matters less gives way.
    for id in [1, 3] {
        scheduler.push_token(id, 9);
        scheduler.push_token(id, 9);
    }
    assert_eq!(scheduler.schedule(), [Scheduled { id: 3, len: 2 }]);
    assert_eq!(scheduler.preemptions, 1);
    assert_eq!(scheduler.waiting.iter().map(|sequence| sequence.id).collect::<Vec<_>>(), [1, 4, 2]);
}

fn of(role: &'static str, id: u64, prompt: Vec<u32>) -> Sequence {
    Sequence { role, ..Sequence::new(id, prompt, None, true) }
}

/// A prompt that begins like no other.
fn own(id: u64, len: usize) -> Vec<u32> {
    vec![1000 + id as u32; len]
}

/// One step; every sequence that has its prompt read gets a token, and those with `wanted` tokens end. Ids of the step.
fn advance(scheduler: &mut Scheduler, wanted: usize) -> Vec<u64> {
    let step = scheduler.schedule();
    check(scheduler);
    scheduler.complete(&step);
    for scheduled in &step {
        let sequence = scheduler.get(scheduled.id).unwrap();
        if sequence.pending() == 0 {
            let done = sequence.tokens.len() >= sequence.prompt_len + wanted;
            if done { scheduler.remove(scheduled.id) } else { scheduler.push_token(scheduled.id, 9) }
        }
    }
    step.iter().map(|scheduled| scheduled.id).collect()
}

/// A hundred requests of one role have taken all places and the queue; those of another need not wait for a single one of them.
#[test]
fn a_flood_of_one_role_holds_up_no_other() {
    for (flood, quiet) in [("teacher", "student"), ("student", "teacher"), ("reward", "student")] {
        let mut scheduler = scheduler(64, 64);
        (0..100).for_each(|id| scheduler.add(of(flood, id, own(id, 5))));
        for _ in 0..7 {
            advance(&mut scheduler, 20);
        }
        assert_eq!(scheduler.running.len(), 4);
        scheduler.add(of(quiet, 100, own(100, 5)));
        assert!(advance(&mut scheduler, 20).contains(&100), "{quiet} beside {flood}");
        assert_eq!(scheduler.running.len(), 4, "the newest of the flood gave its place");
        // From there on nobody is put back: with a place of its own a role waits for the next that is free.
        let before = scheduler.preemptions;
        scheduler.add(of(quiet, 101, own(101, 5)));
        while scheduler.get(101).is_none() {
            advance(&mut scheduler, 20);
        }
        assert_eq!(scheduler.preemptions, before);
        let began = scheduler.waiting.iter().filter(|sequence| sequence.id < 100).count();
        assert!(began >= 90, "and before nearly all of the flood: {began} of it wait");
    }
}

/// Three sequences fill the pool, then each wants one block more. Who came last is put back only where its role runs as much as
/// any other, and a lower priority always.
#[test]
fn a_full_pool_puts_back_the_role_that_runs_most() {
    for (roles, priority, stay) in [
        (["student", "student", "teacher"], 0, [0, 2]),
        (["student", "teacher", "reward"], 0, [0, 1]),
        (["student", "student", "teacher"], 1, [0, 1]),
    ] {
        let mut scheduler = scheduler(9, 64);
        for (id, role) in (0..).zip(roles) {
            let priority = if id == 2 { priority } else { 0 };
            scheduler.add(Sequence { priority, ..of(role, id, own(id, 11)) });
        }
        (0..3).for_each(|_| drop(advance(&mut scheduler, 99)));
        let running: Vec<u64> = scheduler.running().iter().map(|sequence| sequence.id).collect();
        assert_eq!((scheduler.preemptions, running), (1, stay.to_vec()));
    }
}

/// Tokens of each role while all of them ask for more than there is.
fn shares(scheduler: &mut Scheduler, first: u64, steps: usize, roles: &[(&'static str, usize)]) -> Vec<usize> {
    let mut id = first;
    let mut role_of = BTreeMap::new();
    let mut tokens = vec![0; roles.len()];
    for _ in 0..steps {
        for (role, len) in roles {
            while scheduler.waiting.iter().filter(|sequence| sequence.role == *role).count() < 8 {
                scheduler.add(of(role, id, own(id, *len)));
                role_of.insert(id, *role);
                id += 1;
            }
        }
        let step = scheduler.schedule();
        scheduler.complete(&step);
        for scheduled in &step {
            if let Some(at) = roles.iter().position(|(role, _)| Some(role) == role_of.get(&scheduled.id)) {
                tokens[at] += scheduled.len;
            }
            let sequence = scheduler.get(scheduled.id).unwrap();
            if sequence.pending() == 0 {
                let done = sequence.tokens.len() >= sequence.prompt_len + 6;
                if done { scheduler.remove(scheduled.id) } else { scheduler.push_token(scheduled.id, 9) }
            }
        }
        check(scheduler);
    }
    tokens
}

/// Long prompts of one role and short ones of another: the tokens are shared, not the turns.
#[test]
fn roles_that_all_want_more_get_equal_tokens() {
    let mut scheduler = scheduler(64, 32);
    let got = shares(&mut scheduler, 0, 2000, &[("teacher", 40), ("student", 3)]);
    let (most, least) = (got[0].max(got[1]) as f64, got[0].min(got[1]) as f64);
    assert!(least / most > 0.9, "{got:?}");
}

#[test]
fn what_a_role_left_unused_is_no_credit() {
    let mut scheduler = scheduler(64, 32);
    let alone = shares(&mut scheduler, 0, 1000, &[("teacher", 20)]);
    let got = shares(&mut scheduler, 100_000, 400, &[("teacher", 20), ("student", 20)]);
    assert!(alone[0] > 4 * got[1], "there was something to catch up with: {alone:?}");
    assert!((got[0] as f64 / got[1] as f64 - 1.0).abs() < 0.2, "{got:?}");
}

#[test]
fn priority_stands_above_the_roles() {
    let mut scheduler = scheduler(64, 64);
    (0..20).for_each(|id| scheduler.add(of("teacher", id, own(id, 5))));
    advance(&mut scheduler, 20);
    scheduler.add(Sequence { priority: 1, ..of("student", 20, own(20, 5)) });
    while scheduler.waiting.len() > 1 {
        assert!(!advance(&mut scheduler, 20).contains(&20));
    }
    assert_eq!(scheduler.waiting[0].id, 20);
}

/// Five blocks of six are held; who shares four of them needs one more, which there is.
#[test]
fn only_blocks_that_are_missing_are_asked_for() {
    let mut scheduler = scheduler(6, 64);
    scheduler.add(Sequence::new(1, vec![5; 17], None, true));
    assert_eq!(advance(&mut scheduler, 9), [1]);
    scheduler.add(Sequence::new(2, own(2, 8), None, true));
    assert_eq!(advance(&mut scheduler, 9), [1], "another prompt of two blocks and one token does not fit");
    scheduler.remove(2);
    scheduler.add(Sequence::new(3, [vec![5; 16], vec![6; 2]].concat(), None, true));
    assert_eq!(advance(&mut scheduler, 9), [1, 3]);
    assert_eq!((scheduler.get(3).unwrap().cached, scheduler.preemptions), (16, 0));
}

/// The rest of a prompt that is being read in chunks has no blocks yet, but they are spoken for.
#[test]
fn a_prompt_half_read_keeps_its_room() {
    let mut scheduler = scheduler(8, 8);
    scheduler.add(Sequence::new(1, own(1, 23), None, true));
    assert_eq!(advance(&mut scheduler, 1), [1]);
    scheduler.add(Sequence { priority: -1, ..Sequence::new(2, own(2, 11), None, true) });
    while scheduler.get(1).is_some() {
        assert_eq!(advance(&mut scheduler, 1), [1], "three of eight blocks are not free");
    }
    assert_eq!((advance(&mut scheduler, 1), scheduler.preemptions), (vec![2], 0));
}

#[test]
fn a_draft_keeps_what_was_right_and_gives_the_rest_back() {
    let mut scheduler = scheduler(3, 64);
    scheduler.add(Sequence::new(1, vec![5; 7], None, true));
    let step = scheduler.schedule();
    scheduler.complete(&step);
    scheduler.push_token(1, 8);
    let mut step = scheduler.schedule();
    assert_eq!(scheduler.draft(1, &[1, 2, 3, 4, 5, 6]), 4, "as far as there are blocks");
    step[0].len += 4;
    check(&scheduler);
    scheduler.complete(&step);
    for (token, settled, computed, blocks) in [(1, 9, 9, 3), (9, 10, 9, 3)] {
        scheduler.push_token(1, token);
        let sequence = scheduler.get(1).unwrap();
        assert_eq!((sequence.settled(), sequence.computed, sequence.blocks.len()), (settled, computed, blocks));
    }
    assert_eq!(scheduler.get(1).unwrap().tokens[7..], [8, 1, 9]);
    // All of the next is wrong: the blocks are those that it would hold without.
    let mut step = scheduler.schedule();
    step[0].len += scheduler.draft(1, &[4, 4]);
    scheduler.complete(&step);
    scheduler.push_token(1, 7);
    check(&scheduler);
    scheduler.remove(1);
    check(&scheduler);
    assert_eq!((scheduler.preemptions, scheduler.blocks.available()), (0, 3));
    let (found, _) = scheduler.blocks.find_prefix(root(None, None), &[5, 5, 5, 5, 5, 5, 5, 8, 1, 9, 4, 4, 0]);
    assert_eq!(found.len(), 2, "no block with a token that was thrown away");
}

proptest! {
    #[test]
    fn random_schedules_lose_no_block_and_finish_everything(
        prompts in prop::collection::vec(prop::collection::vec(0u32..3, 1..20), 1..12),
        num_blocks in 8usize..14, budget in 1usize..24, wanted in 1usize..10, cancel in 0u64..12, roles in 1usize..4,
    ) {
        let mut scheduler = scheduler(num_blocks, budget);
        for (id, prompt) in prompts.iter().enumerate() {
            let sequence = Sequence::new(id as u64, prompt.clone(), None, id % 3 != 0);
            let role = ["teacher", "reward", "student"][(id + prompt.len()) % roles];
            scheduler.add(Sequence { priority: id as i64 % 2, role, ..sequence });
        }
        let mut steps = 0;
        while !scheduler.is_idle() {
            let mut step = scheduler.schedule();
            prop_assert!(!step.is_empty(), "a step always makes progress");
            let (put_back, mut room) = (scheduler.preemptions, budget - step.iter().map(|scheduled| scheduled.len).sum::<usize>());
            for scheduled in &mut step {
                if scheduler.get(scheduled.id).is_some_and(|sequence| sequence.pending() == 1) {
                    let draft = [1, steps as u32 % 3, 1];
                    let len = scheduler.draft(scheduled.id, &draft[..room.min(3)]);
                    (scheduled.len, room) = (scheduled.len + len, room - len);
                }
            }
            prop_assert_eq!(put_back, scheduler.preemptions, "nobody is put back for a draft");
            prop_assert!(step.iter().map(|scheduled| scheduled.len).sum::<usize>() <= budget);
            check(&scheduler);
            scheduler.complete(&step);
            for scheduled in &step {
                let sequence = scheduler.get(scheduled.id).expect("scheduled sequences run");
                if sequence.pending() == 0 {
                    if sequence.settled() >= sequence.prompt_len + wanted {
                        scheduler.remove(scheduled.id);
                        continue;
                    }
                    // A token that was drafted is computed already, and another follows.
                    while scheduler.get(scheduled.id).unwrap().pending() == 0 {
                        scheduler.push_token(scheduled.id, steps as u32 % 3);
                    }
                }
            }
            steps += 1;
            if steps == 3 { scheduler.remove(cancel); }
            prop_assert!(steps < 5000, "preemption must not go in circles");
            check(&scheduler);
        }
        prop_assert_eq!(scheduler.blocks.available(), num_blocks);
        prop_assert!(scheduler.served.is_empty(), "an empty queue owes nobody anything");
    }
}
