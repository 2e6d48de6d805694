/* The kvstore protocol: a store, writers, readers, and a network that is never in a hurry.
 *
 * README.md says what is modelled, what is proven and what each macro changes; check.sh runs it.
 *
 * A request and its answer are one atomic step of the caller: time passes before and after it.
 * Whatever has a deadline may end in any state. Ids never repeat, so an id is a place in the books
 * and whether it still stands for what is there; that needs no numbers, and no bound on operations.
 */

#ifndef WRITERS
#define WRITERS 2
#endif
#ifndef READERS
#define READERS 2
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef KEYS
#define KEYS 2
#endif
#ifndef PARTS
#define PARTS 1 /* in which the bytes of a block arrive */
#endif
#define NONE 255

#define FREE 0
#define RESERVED 1
#define SEALED 2
#define QUARANTINED 3
#define DROPPED 4
#define IS_OPEN(x) (slot[x].state == RESERVED || slot[x].state == QUARANTINED)
#define CAN_BE_LATE(w) (write[w].holds && CAN_SEAL(write[w].slot))
#define IS_LISTED(x) (slot[x].state == RESERVED || slot[x].state == SEALED)

#ifdef LATE_SEAL /* an expired reservation may be sealed */
#define CAN_SEAL(x) IS_OPEN(x)
#else
#define CAN_SEAL(x) (slot[x].state == RESERVED)
#endif
#ifdef SAME_IDS /* a restarted store begins its ids again: an old one may be that of another slot */
#define SET_OWNER(x, w) slot[x].owner = w
#else
#define SET_OWNER(x, w) skip
#endif
#ifdef SEAL_EARLY /* a writer seals while its WRITE goes on */
#define IS_WRITTEN CAN_LEAVE_WRITE
#define SEAL_EARLY_LEAVES leave_write(w)
#else
#define IS_WRITTEN (!write[w].on)
#define SEAL_EARLY_LEAVES skip
#endif
#ifdef ACK_EARLY /* a writer gives its slot back while its WRITE goes on */
#define ACK_EARLY_LEAVES if :: CAN_LEAVE_WRITE -> leave_write(w) :: else -> skip fi
#else
#define ACK_EARLY_LEAVES skip
#endif
#ifdef LEAK /* a lease without a reader never ends */
#define LEASES_END false
#else
#define LEASES_END true
#endif
#ifdef NO_CONFIRM /* a reader uses what it read, whatever Release answers */
#define IS_CONFIRMED(held) (true)
#else
#define IS_CONFIRMED(held) (held)
#endif
#ifdef DIGEST /* a reader compares what it read with the digest given to Seal */
#define IS_VERIFIED(equal) (equal)
#else
#define IS_VERIFIED(equal) (true)
#endif

/* The store: its books, and the memory it owns. A freed slot keeps its bytes. `is_lent` is a lease
 * that no reader remembers, `seal_is_late` a Seal that no writer waits for: both may come to their
 * end at any time. */
typedef Slot {
    byte state; byte key; byte digest; bool is_lent; bool seal_is_late; byte owner;
    byte memory[PARTS]
};
Slot slot[SLOTS];

/* A reservation and the WRITE under it, a lease and the READ under it. `on`: bytes may yet arrive.
 * `holds`: the store still knows the reservation or the lease. The last of each array is a transfer
 * that a crash or an early end left to itself. */
typedef Write { bool on; bool holds; byte slot; byte key; byte part };
typedef Read {
    bool on; bool holds; bool failed; byte slot; byte key; byte part; byte digest;
    byte memory[PARTS] /* where the bytes arrive */
};
#define LEFT_WRITE WRITERS
#define LEFT_READ READERS
Write write[WRITERS + 1];
Read read[READERS + 1];
#ifdef SAME_IDS
byte stale_seal[WRITERS + 1]; /* key of a late Seal that a restart left behind */
#endif
byte num_stopped;
#define IS_BUSY (num_stopped < WRITERS + READERS)
hidden byte s, i, j, any, ok;

inline pick_key(k) {
    if
    :: k = 1
#if KEYS > 1
    :: k = 2
#endif
    fi
}

inline forget_write(f) {
    write[f].on = false; write[f].holds = false; write[f].slot = 0; write[f].key = 0;
    write[f].part = 0
}

inline forget_read(f) {
    read[f].on = false; read[f].holds = false; read[f].failed = false; read[f].slot = 0;
    read[f].key = 0; read[f].part = 0; read[f].digest = 0;
    for (i : 0 .. PARTS - 1) { read[f].memory[i] = 0 };
    skip /* a d_step must not end with a loop */
}

/* Operations of the store. */

/* Nothing that anyone remembers stands for slot x any more. */
inline free_slot(x) {
    slot[x].state = FREE; slot[x].key = 0; slot[x].digest = 0; slot[x].owner = 0;
    slot[x].is_lent = false; slot[x].seal_is_late = false;
    for (i : 0 .. WRITERS) { write[i].holds = write[i].holds && write[i].slot != x };
    skip
}

/* Whether a live lease reads slot x: in any. */
inline find_leases(x) {
    any = slot[x].is_lent;
    for (i : 0 .. READERS - 1) { any = any || (read[i].holds && read[i].slot == x) }
}

/* Whether a writer may still put bytes into slot x: in any. */
inline find_writers(x) {
    any = false;
    for (i : 0 .. WRITERS) {
        any = any || (write[i].on && write[i].holds && write[i].slot == x)
    }
}

/* The slot in s; NONE where nothing is granted. */
inline store_reserve(w, k) {
    s = NONE;
    for (i : 0 .. SLOTS - 1) {
        if
        :: slot[SLOTS - 1 - i].state == FREE -> s = SLOTS - 1 - i
        :: else -> skip
        fi
    }
    for (i : 0 .. SLOTS - 1) {
        if
        :: IS_LISTED(i) && slot[i].key == k -> s = NONE
        :: else -> skip
        fi
    }
    if
    :: s != NONE ->
       slot[s].state = RESERVED; slot[s].key = k; SET_OWNER(s, w);
       printf("store: slot %d is reserved for key %d\n", s, k)
    :: else -> skip
    fi
}

/* Slot x, as holding the content of key k. */
inline seal_slot(x, k) {
    slot[x].state = SEALED; slot[x].digest = k; slot[x].seal_is_late = false;
    printf("store: slot %d is sealed, key %d\n", x, slot[x].key);
    any = false;
    for (i : 0 .. SLOTS - 1) {
        any = any || (i != x && IS_LISTED(i) && slot[i].key == slot[x].key)
    }
    assert(!any) /* one slot a key */
}

/* Whether it is sealed now, in ok. */
inline store_seal(w) {
    ok = false; s = write[w].slot; j = write[w].key;
    if
    :: write[w].holds && CAN_SEAL(s) -> seal_slot(s, j); ok = true
    :: else -> ok = write[w].holds && slot[s].state == SEALED
    fi
}

inline store_acknowledge(w) {
    s = write[w].slot;
    if
    :: write[w].holds && IS_OPEN(s) -> free_slot(s); printf("store: slot %d is given back\n", s)
    :: else -> skip
    fi
}

/* The slot in s; NONE where nothing is sealed under the key. */
inline store_lookup(k) {
    s = NONE;
    for (i : 0 .. SLOTS - 1) {
        if
        :: slot[i].state == SEALED && slot[i].key == k -> s = i
        :: else -> skip
        fi
    }
}

/* A lease on slot x ended: a dropped block waits for its last one. */
inline unlend(x) {
    find_leases(x);
    if
    :: slot[x].state == DROPPED && !any -> free_slot(x)
    :: else -> skip
    fi
}

/* Whether the lease held, in ok. */
inline store_release(r) {
    ok = read[r].holds; s = read[r].slot;
    read[r].holds = false;
    if
    :: ok -> unlend(s)
    :: else -> skip
    fi
}

inline expire_reservation(x) {
    printf("store: the reservation of slot %d expires\n", x);
#ifdef NO_QUARANTINE
    free_slot(x)
#else
    slot[x].state = QUARANTINED;
#ifndef LATE_SEAL
    slot[x].key = 0; slot[x].seal_is_late = false
#endif
#endif
}

/* The writer is taken for dead: quarantine_s is over, or its incarnation is gone. */
inline end_quarantine(x) {
    find_writers(x);
#ifdef HOSTILE /* and is not */
    any = false;
#endif
    if
    :: any -> skip
    :: else -> free_slot(x); printf("store: the writer of slot %d is taken for dead\n", x)
    fi
}

/* Evicted, corrupt, discarded, private: a leased block waits for its readers. */
inline drop(x) {
    printf("store: slot %d is dropped\n", x);
    find_leases(x);
#ifdef EVICT_LEASED
    any = false;
#endif
    if
    :: any -> slot[x].state = DROPPED; slot[x].key = 0; slot[x].digest = 0
    :: else -> free_slot(x)
    fi
}

/* New books over new memory; what others remember is of an old life. */
inline restart() {
    for (j : 0 .. SLOTS - 1) {
#ifdef SAME_IDS
        if
        :: slot[j].seal_is_late -> stale_seal[slot[j].owner] = slot[j].key
        :: else -> skip
        fi;
#endif
        free_slot(j);
        for (i : 0 .. PARTS - 1) { slot[j].memory[i] = 0 }
    };
    for (i : 0 .. READERS - 1) { read[i].holds = false };
    printf("store: restarts\n");
#ifndef STALE_PEER /* transfers reach the new store, where the former one said */
    forget_write(LEFT_WRITE);
    for (i : 0 .. WRITERS - 1) { write[i].on = false; write[i].part = 0 };
    for (i : 0 .. READERS) {
        read[i].failed = read[i].failed || read[i].on;
        read[i].on = false; read[i].part = 0
    };
#endif
    skip
}

#define OF_SLOT(x) \
    :: d_step { slot[x].state == RESERVED -> expire_reservation(x) } \
    :: d_step { slot[x].state == QUARANTINED -> end_quarantine(x) } \
    :: d_step { slot[x].state == SEALED -> drop(x) } \
    :: d_step { slot[x].state == SEALED && IS_BUSY -> slot[x].is_lent = true } \
    :: d_step { slot[x].is_lent && LEASES_END -> slot[x].is_lent = false; unlend(x) } \
    :: d_step { slot[x].seal_is_late && CAN_SEAL(x) -> j = slot[x].key; seal_slot(x, j) }
#define OF_LEASE(r) \
    :: d_step { read[r].holds -> store_release(r); printf("store: the lease of slot %d ends\n", s) }
#define OF_STALE_SEAL(w, x) \
    :: d_step { stale_seal[w] && slot[x].state == RESERVED && slot[x].owner == w -> \
                j = stale_seal[w]; stale_seal[w] = 0; seal_slot(x, j) }

/* What the store does by itself: deadlines, eviction, and requests that nobody waits for. */
proctype Store() {
end:
    do
    OF_SLOT(0)
#if SLOTS > 1
    OF_SLOT(1)
#endif
#if SLOTS > 2
    OF_SLOT(2)
#endif
    OF_LEASE(0)
#if READERS > 1
    OF_LEASE(1)
#endif
    :: atomic { IS_BUSY -> pick_key(j); d_step { store_reserve(WRITERS, j) } }
#ifdef SAME_IDS
    OF_STALE_SEAL(0, 0)
    OF_STALE_SEAL(0, 1)
    OF_STALE_SEAL(1, 0)
    OF_STALE_SEAL(1, 1)
#endif
    :: d_step { IS_BUSY -> restart() }
    od
}

/* The network: bytes arrive part by part, at any time. */

inline land_write(f) {
    s = write[f].slot;
#ifdef OWNERS
    assert(write[f].holds && IS_OPEN(s)); /* a slot has one owner */
#endif
    slot[s].memory[write[f].part] = write[f].key;
    printf("network: bytes of key %d arrive in slot %d\n", write[f].key, s);
    write[f].part++;
    if
    :: write[f].part < PARTS -> skip
    :: write[f].part == PARTS && f == LEFT_WRITE -> forget_write(f)
    :: else -> write[f].on = false; write[f].part = 0
    fi
}

/* Into the memory of reader r. */
inline land_read(f, r) {
    s = read[f].slot;
    read[r].memory[read[f].part] = slot[s].memory[read[f].part];
    printf("network: reader %d gets bytes of key %d\n", r, slot[s].memory[read[f].part]);
    read[f].part++;
    if
    :: read[f].part < PARTS -> skip
    :: else -> read[f].on = false; read[f].part = 0
    fi
}

#define OF_WRITE(f) \
    :: d_step { write[f].on -> land_write(f) }
#define OF_READ(f, r) \
    :: d_step { read[f].on -> land_read(f, r) }

proctype Network() {
end:
    do
    OF_WRITE(0)
    OF_WRITE(1)
#if WRITERS > 1
    OF_WRITE(2)
#endif
    OF_READ(0, 0)
#if READERS > 1
    OF_READ(1, 1)
#endif
#ifdef NO_HOLD
    OF_READ(LEFT_READ, 0)
#endif
    od
}

/* Leaves a WRITE to itself; there is room for one. */
inline leave_write(w) {
    if
    :: write[w].on ->
       write[LEFT_WRITE].on = true; write[LEFT_WRITE].holds = write[w].holds;
       write[LEFT_WRITE].slot = write[w].slot; write[LEFT_WRITE].key = write[w].key;
       write[LEFT_WRITE].part = write[w].part
    :: else -> skip
    fi;
    write[w].on = false; write[w].part = 0
}
#define CAN_LEAVE_WRITE (!write[w].on || !write[LEFT_WRITE].on)

/* Reserve and WRITE, then Seal, or else Acknowledge. An answer may be lost at any time. */
proctype Writer(byte w) {
begin:
    if
    :: atomic {
       pick_key(j);
       d_step {
           store_reserve(w, j);
           if
           :: s != NONE ->
              write[w].on = true; write[w].holds = true; write[w].slot = s; write[w].key = j;
              printf("writer %d: writes key %d into slot %d\n", w, j, s)
           :: else -> skip
           fi
       };
       if
       :: s == NONE -> goto begin
       :: else -> skip
       fi }
    :: d_step { true -> num_stopped++ } -> goto stop
    fi;
writing:
    if
    /* The WRITE is over: Seal, whose answer may be lost and which may come late and again. */
    :: atomic {
       IS_WRITTEN -> d_step { SEAL_EARLY_LEAVES; store_seal(w) };
       if
       :: ok -> d_step { forget_write(w) }; goto begin
       :: true -> goto writing
       fi }
    :: d_step { IS_WRITTEN && CAN_BE_LATE(w) -> s = write[w].slot; slot[s].seal_is_late = true } ->
       goto writing
    /* It failed, or was not over in time; what is left of it ended before this. */
    :: d_step { true -> ACK_EARLY_LEAVES; store_acknowledge(w); forget_write(w) } -> goto begin
    /* The writer dies: its next life knows nothing, but its WRITE goes on. */
    :: d_step {
       CAN_LEAVE_WRITE ->
       leave_write(w); forget_write(w); printf("writer %d: dies\n", w) } -> goto begin
    fi;
stop:
    skip
}

/* A lease whose reader died, or whose Release is late or lost, goes on until it expires. */
inline leave_lease(r) {
    s = read[r].slot;
    slot[s].is_lent = slot[s].is_lent || read[r].holds;
    read[r].holds = false
}

#define HAS_READ (!read[r].on && !read[r].failed)

/* The bytes that reader r uses must be those that its key stands for. */
inline use(r) {
    for (i : 0 .. PARTS - 1) { assert(!ok || read[r].memory[i] == read[r].key) };
    forget_read(r)
}

/* Verifies what reader r has read if its lease held, and uses it if it is right. */
inline finish(r) {
    for (i : 0 .. PARTS - 1) { ok = ok && IS_VERIFIED(read[r].memory[i] == read[r].digest) };
    if
    :: ok -> printf("reader %d: may use what it read\n", r)
    :: else -> printf("reader %d: must not use what it read\n", r)
    fi;
#ifdef NO_HOLD /* some time later */
    read[r].failed = !ok
#else
    use(r)
#endif
}
#ifdef NO_HOLD
#define AFTER_READ using
#else
#define AFTER_READ begin
#endif

/* Lookup and READ, Release, verify, use. */
proctype Reader(byte r) {
begin:
    if
    :: atomic {
       pick_key(j);
       d_step {
           store_lookup(j);
           if
           :: s != NONE ->
              read[r].on = true; read[r].holds = true; read[r].slot = s; read[r].key = j;
              read[r].digest = slot[s].digest;
              printf("reader %d: leases slot %d for key %d\n", r, s, j)
           :: else -> skip
           fi
       };
       if
       :: s == NONE -> goto begin
       :: else -> skip
       fi }
    :: d_step { true -> num_stopped++ } -> goto stop
    fi;
reading:
    if
    /* The READ is over. What is confirmed and verified is used; an answer may be lost. */
    :: d_step { HAS_READ -> store_release(r); ok = IS_CONFIRMED(ok); finish(r) } -> goto AFTER_READ
    :: d_step { HAS_READ -> leave_lease(r); ok = IS_CONFIRMED(false); finish(r) } -> goto AFTER_READ
    :: d_step { read[r].failed -> leave_lease(r); forget_read(r) } -> goto begin
    /* The deadline: the READ goes on, and its blocks are held until it is over. */
    :: d_step { read[r].on -> store_release(r); read[r].key = 0; read[r].digest = 0 } -> goto late
    :: d_step { read[r].on -> leave_lease(r); read[r].key = 0; read[r].digest = 0 } -> goto late
    /* The reader dies; a READ into a dead process reaches nobody. */
    :: d_step { leave_lease(r); forget_read(r); printf("reader %d: dies\n", r) } -> goto begin
    fi;
#ifdef NO_HOLD
using:
    if
    :: d_step { ok = !read[r].failed; use(r) } -> goto begin
    fi;
#endif
late:
    if
    :: d_step { !read[r].on -> forget_read(r) }
#ifdef NO_HOLD /* the blocks are used again at once */
    :: d_step {
       r == 0 && read[r].on && !read[LEFT_READ].on ->
       read[LEFT_READ].on = true; read[LEFT_READ].slot = read[r].slot;
       read[LEFT_READ].part = read[r].part; forget_read(r) }
#endif
    fi;
    goto begin;
stop:
    skip
}

/* When nothing can happen any more, nobody holds anything. */
proctype Rest() {
    timeout ->
    assert(!IS_BUSY);
    d_step {
        for (i : 0 .. SLOTS - 1) { assert(slot[i].state == FREE) }
        for (i : 0 .. WRITERS) { assert(!write[i].on) };
        for (i : 0 .. READERS) { assert(!read[i].on) };
        skip
    }
}

init {
    atomic {
        run Store(); run Network(); run Rest();
        for (i : 0 .. WRITERS - 1) { run Writer(i) }
        for (i : 0 .. READERS - 1) { run Reader(i) }
    }
}
