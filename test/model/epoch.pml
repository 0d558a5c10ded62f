/*
 * Tidemark's epoch protocol: writes that are marked at both ends; epochs that are
 * swapped, read, committed and released; processes that are killed meanwhile.
 * docs/protocol.md explains it and says which code each step stands for.
 *
 * main.go sets the bounds and the broken variants, which are macros.
 */

#ifndef WRITES
#define WRITES 3   /* in all */
#endif
#ifndef SWAPS
#define SWAPS 3
#endif
#ifndef KILLS
#define KILLS 1    /* kill -9, or a backup that fails */
#endif
#ifndef FOREIGN
#define FOREIGN 0  /* backups to another repository */
#endif
#ifndef RETAINED
#define RETAINED 2 /* closed epochs that are kept before they are merged */
#endif
#ifndef COPIES
#define COPIES 1   /* of each program */
#endif
#ifndef MISSES
#define MISSES 0   /* times that a copy is not run */
#endif

#ifdef INSTANT_BEFORE_PAUSE
#define NAMES_LAST_SWAP false
#else
#define NAMES_LAST_SWAP true
#endif
#ifdef ADOPT_DROPS_CLOSED
#define ADOPTION_DROPS true
#else
#define ADOPTION_DROPS false
#endif
#if MISSES > 0
#define UNKNOWN_HAPPENS (misses < MISSES)
#elif defined(BEGINNING) || defined(ANY_COMPARE) /* P5 is not asked */
#define UNKNOWN_HAPPENS true
#else
#define UNKNOWN_HAPPENS false
#endif

#define WRITERS 2
#define ALL 3 /* granules, as a mask */
#define NUMBERS (SWAPS + 3) /* 1 to SWAPS + 1, and one that is never pinned */
#define SUBMIT 0
#define COMPLETE 1
#define END_OF(what) (what == SUBMIT -> submission : completion)
#define COUNTERS (2 * COPIES)

#ifdef NO_GAP_CHECK
#define CHECK_GAPS false
#else
#define CHECK_GAPS true
#endif

/* Granules and writers are masks. Epochs are arrays by number, which begin at 1. */

/* The kernel. */
byte current = 1;	/* the epoch in the outer map */
byte bitmap[NUMBERS];
bit taint[NUMBERS];
byte running;		/* writers inside a tracepoint */
byte awaited;		/* those that the grace period waits for */
byte looked[WRITERS];	/* the epoch that a running program has looked up */
byte announced;		/* writers whose range was remembered at submission */
#if MISSES > 0
byte missed[COUNTERS];	/* recursion misses, by program and copy */
byte misses = MISSES;	/* that may still happen */
#else
#endif

/* Headers of pinned epochs: they survive the process. */
bit pinned[NUMBERS];
byte first[NUMBERS];
bit closed[NUMBERS];	/* its losses are written down */
bit loss[NUMBERS];
bit final[NUMBERS];	/* for P2: a process believes that it changes no more */
#if MISSES > 0
byte base[NUMBERS * COUNTERS];
#endif

/* The newest durable point. */
byte id;		/* its change ID */
bit none;		/* there is no point yet */

/* The disk, against the copies of it. Every write brings new data, so a copy of a granule
 * is out of date when a write landed since it was read: that alone is kept. */
#define POINT 0		/* the durable copy */
#define WORK 1		/* the copy that the running backup makes */
byte granule[WRITERS];	/* where the write in flight goes, or 0 */
byte ahead[2];		/* writes in flight that landed and are not in the copy */
byte lacks[2];		/* granules of which the copy lacks a completed write */

#ifdef BEGINNING
bit unseen = 1;		/* writer 0 submitted before tracking began */
#endif

byte writes = WRITES;	/* that may still happen, as the next two */
byte kills = KILLS;
byte foreigns = FOREIGN;
byte givenup;		/* newest epoch that a foreign commit released */

/* The process. */
byte at;		/* the change ID that the working copy has reached */
bit zero;		/* it has reached none */
byte pending;		/* granules to be read */
byte due;		/* P1: of these a write had completed when the last epoch was closed */
byte old, n, x;
bit foreign, again;
#if MISSES > 0
byte sample[COUNTERS];
#endif

#ifdef INSTANTS
/* P4: the instant that the point would name is the end of a swap. */
byte late;		/* writers that submitted after it */
byte diskLate, workLate; /* granules that hold data of such a write */
byte early;		/* granules that lacked a write that had completed by then */
bit failedPause;
bit lackedEarly, heldLate; /* what of this was so when the next swap came */
bit marked;		/* the look at the current epoch found something */
#endif

/* Scratch: holds nothing between two steps. A search for the shortest trace takes no hidden ones. */
#ifdef SHORTEST
#define SCRATCH byte
#else
#define SCRATCH hidden byte
#endif
SCRATCH e, c, m, want, least, u;
#define CLEAN e = 0; c = 0; m = 0; want = 0; least = 0; u = 0

#define PROPERTY(name, ok, text) \
	if \
	:: (ok) \
	:: else -> printf("%e|violated: ", name); printf(text); assert(false) \
	fi

mtype = { P1, P2, P4, P5, submission, completion };

/* cbt.Tracked.since and judge: in m the granules that the epochs after from, up to
 * last, hold; in u whether that is unknown. */
inline changesSince(from, last)
{
	want = from + 1; m = 0; u = 0;
	for (e : 1 .. last) {
		if
		:: pinned[e] && e >= want && (first[e] <= want || !CHECK_GAPS) ->
			m = m | bitmap[e];
			u = u || taint[e] || loss[e];
			want = e + 1
		:: else
		fi
	}
	u = u || (CHECK_GAPS && want != last + 1)
}

/* In u: all copies of a program missed something since epoch i began, by the counters. */
#define LEAST(counters, i, from, to) \
	least = 255; \
	for (c : from .. to) { \
		least = (counters[c] - base[(i) * COUNTERS + c] < least -> counters[c] - base[(i) * COUNTERS + c] : least) \
	} \
	u = u || (least > 0)
#if MISSES > 0 && !defined(ONE_COPY)
#define LOSS_SINCE(counters, i) LEAST(counters, i, 0, COPIES - 1); LEAST(counters, i, COPIES, COUNTERS - 1)
#else
#define LOSS_SINCE(counters, i) skip
#endif

/* P1 as it must hold at any time: what the point lacks is marked in an epoch that the
 * next delta takes in, or that delta will be unknown. */
inline nothingForgotten()
{
	if
	:: lacks[POINT] != 0 && !none ->
		changesSince(id, current);
		for (e : 1 .. current) {
			if
			:: pinned[e] && !closed[e] -> LOSS_SINCE(missed, e)
			:: else
			fi
		}
		PROPERTY(P1, u || (lacks[POINT] & ~m) == 0, "the point lacks a completed write, and no later delta will hold it\n")
	:: else
	fi
}

#define W (1 << w)

/* A program marks in the epoch that it has looked up. */
inline mark(what)
{
	printf("writer %d|the program marks granule %d in epoch %d\n", w, granule[w] - 1, looked[w]);
#ifdef BIO
	if
	:: what == SUBMIT -> bitmap[looked[w]] = bitmap[looked[w]] | granule[w]; announced = announced | W
	:: what == COMPLETE && (announced & W) != 0 -> bitmap[looked[w]] = bitmap[looked[w]] | granule[w]
	:: else -> taint[looked[w]] = 1 /* the bio no longer tells where it wrote */
	fi;
#else
	bitmap[looked[w]] = bitmap[looked[w]] | granule[w];
#endif
	PROPERTY(P2, !final[looked[w]], "a program marked in an epoch that was being read already\n");
	looked[w] = 0
}

/* The tracepoint returns. */
inline leave(what)
{
	running = running & ~W;
	awaited = awaited & ~W;
	if
	:: what == COMPLETE ->
		lacks[POINT] = lacks[POINT] | ((ahead[POINT] & W) != 0 -> granule[w] : 0);
		lacks[WORK] = lacks[WORK] | ((ahead[WORK] & W) != 0 -> granule[w] : 0);
		ahead[POINT] = ahead[POINT] & ~W;
		ahead[WORK] = ahead[WORK] & ~W;
		announced = announced & ~W;
		granule[w] = 0;
#ifdef INSTANTS
		late = late & ~W;
#endif
		nothingForgotten()
	:: else
	fi
}

/* A tracepoint is hit: the copies of its program run one after the other, under one RCU
 * read lock. */
#define LAST (copy == COPIES - 1)

inline lookUp(what)
{
	running = running | W;
	looked[w] = current;
	printf("writer %d|at %e, a program looks up the current epoch: %d\n", w, END_OF(what), current)
}

inline miss(what)
{
#if MISSES > 0
	misses--;
	running = running | W;
	missed[what * COPIES + copy]++;
	printf("writer %d|at %e, the kernel does not run copy %d of the program\n", w, END_OF(what), copy)
#else
	skip
#endif
}

inline event(what)
{
	do
	:: d_step { looked[w] == 0 -> lookUp(what) }
	:: d_step { looked[w] != 0 && !LAST -> mark(what); copy++
#ifdef GRACE_PER_PROGRAM
		; awaited = awaited & ~W
#endif
	}
	:: atomic { looked[w] != 0 && LAST -> d_step { mark(what); leave(what); copy = 0; CLEAN }; break }
#if MISSES > 0
	:: d_step { looked[w] == 0 && misses > 0 && !LAST -> miss(what); copy++ }
	:: atomic { looked[w] == 0 && misses > 0 && LAST -> d_step { miss(what); leave(what); copy = 0; CLEAN }; break }
#endif
	od
}

proctype writer(byte w)
{
	byte copy;

end:
	do
	/* Idle writers and untouched granules are alike: the first is taken. */
	:: atomic {
		writes > 0 && granule[w] == 0 && (w == 0 || granule[0] != 0) ->
		if
		:: granule[w] = 1
		:: writes < WRITES || none -> granule[w] = 2
		fi;
		writes--;
#ifdef INSTANTS
		late = late | W;
#endif
		printf("writer %d|submits a write to granule %d\n", w, granule[w] - 1);
#if !defined(NO_SUBMISSION_MARK) && MISSES == 0
		lookUp(SUBMIT)
#endif
	};
#ifndef NO_SUBMISSION_MARK
	event(SUBMIT);
#endif
landing:
	if
	:: d_step {
		printf("writer %d|its write to granule %d lands on the disk\n", w, granule[w] - 1);
		ahead[POINT] = ahead[POINT] | W;
		ahead[WORK] = ahead[WORK] | W;
#ifdef INSTANTS
		diskLate = diskLate | ((late & W) != 0 -> granule[w] : 0);
#endif
	}
	fi;
#ifdef NO_COMPLETION_MARK
	d_step {
		printf("writer %d|its write completes, and is not marked\n", w);
		leave(COMPLETE);
		CLEAN
	}
#else
	event(COMPLETE);
#endif
#ifdef BEGINNING
	/* Submitted before tracking began. */
	:: atomic { unseen && w == 0 -> unseen = 0; goto landing }
#endif
	od
}

/* The epoch that began with it is closed. */
inline instantEnds()
{
#ifdef INSTANTS
	lackedEarly = early != 0;
	heldLate = workLate != 0
#else
	skip
#endif
}

inline graceBegins()
{
#if defined(NO_GRACE)
	skip
#elif defined(GRACE_PER_PROGRAM)
	awaited = (looked[0] != 0 -> 1 : 0) | (looked[1] != 0 -> 2 : 0)
#else
	awaited = running
#endif
}

/* The backup may find that this was an instant. */
inline instantBegins()
{
#ifdef INSTANTS
	if
	:: !failedPause || NAMES_LAST_SWAP ->
		late = 0; diskLate = 0; workLate = 0; early = lacks[WORK]
	:: else
	fi
#else
	skip
#endif
}

/* What a process that is gone leaves: nothing of its own. */
inline vanish()
{
	at = 0; zero = 0; pending = 0; due = 0; old = 0; n = 0; x = 0; foreign = 0; again = 0;
	lacks[WORK] = lacks[POINT];
	ahead[WORK] = ahead[POINT];
	dropSample();
#ifdef INSTANTS
	late = 0; diskLate = 0; workLate = 0; early = 0; failedPause = 0; lackedEarly = 0; heldLate = 0; marked = 0;
#endif
}

/* A step of the process that outlives it. It may be killed before. */
#define STEP(words, ...) \
	if \
	:: atomic { kills > 0 -> d_step { kills--; printf(words); vanish(); CLEAN }; goto killed } \
	:: d_step { __VA_ARGS__; CLEAN } \
	fi

/* A d_step that others may jump to. */
#define LOCAL(...) \
	if \
	:: d_step { __VA_ARGS__; CLEAN } \
	fi

/* bpf.Tracker.Misses: one counter after the other. */
inline takeSample()
{
#if MISSES > 0
	n = 0;
	do
	:: d_step { n < COUNTERS -> sample[n] = missed[n]; n++ }
	:: d_step { n == COUNTERS -> n = 0 } -> break
	od
#else
	skip
#endif
}

inline dropSample()
{
#if MISSES > 0
	for (c : 0 .. COUNTERS - 1) {
		sample[c] = 0
	}
	c = 0
#else
	skip
#endif
}

inline setBase(i)
{
#if MISSES > 0
	for (c : 0 .. COUNTERS - 1) {
		base[(i) * COUNTERS + c] = sample[c]
	}
	c = 0
#else
	skip
#endif
}

inline clearBase(i)
{
#if MISSES > 0
	for (c : 0 .. COUNTERS - 1) {
		base[(i) * COUNTERS + c] = 0
	}
	c = 0
#else
	skip
#endif
}

inline unpin(i)
{
	pinned[i] = 0; first[i] = 0; closed[i] = 0; loss[i] = 0; bitmap[i] = 0; taint[i] = 0; final[i] = 0;
	clearBase(i)
}

#ifdef INSTANTS
/* bpf.Registration.Untouched: what the current epoch shows so far. */
inline lookAt()
{
	LOCAL(marked = (bitmap[current] != 0 || taint[current]));
	takeSample();
#ifndef LOOK_PAST_MISSES
	LOCAL(u = marked; LOSS_SINCE(sample, current); marked = u);
#endif
	LOCAL(dropSample(); printf("process|looks at the current epoch %d: something in it: %d\n", current, marked))
}
#endif

/* bpf.Registration.finish */
inline finish(i)
{
	takeSample();
	STEP("process|KILLED before it can write down what the closed epoch lost\n",
		u = loss[i];
		LOSS_SINCE(sample, i);
		loss[i] = u;
		dropSample();
		printf("process|writes down whether epoch %d lost events: %d\n", i, u));
	STEP("process|KILLED before it can say that the closed epoch is finished\n",
		closed[i] = 1;
		clearBase(i); /* of no more use */
		nothingForgotten())
}

/* A point becomes durable, unless the backup goes to another repository. */
#define COMMIT \
	if \
	:: !foreign -> \
		STEP("process|KILLED before it can commit the point\n", \
			id = at; \
			none = 0; \
			lacks[POINT] = lacks[WORK]; \
			ahead[POINT] = ahead[WORK]; \
			printf("process|commits the point, with change ID %d\n", id); \
			PROPERTY(P1, due == 0, "the point lacks a write that had completed when its last epoch was closed\n"); \
			nothingForgotten()) \
	:: else \
	fi

/* In n: the oldest epoch that is pinned, at most last, and wanted; or 0. */
#define OLDEST(last, wanted) \
	n = 0; \
	for (e : 1 .. last) { \
		if \
		:: n == 0 && pinned[e] -> \
			u = 0; \
			for (c : e + 1 .. current - 1) { \
				u = u || (pinned[c] && first[c] <= first[e]) \
			}; \
			n = ((wanted) -> e : 0) \
		:: else \
		fi \
	}
#define MERGED (u == 1) /* into a newer closed epoch */

proctype process()
{
	goto job;

	/* bpf.Registration.load. Its lock is free when a process that was killed has left
	 * the kernel. */
killed:
	if
	:: pinned[current + 1] ->
		STEP("process|KILLED before it can drop the epoch that was never installed\n",
			printf("process|another one begins; it drops epoch %d, which was never installed\n", current + 1);
			unpin(current + 1))
	:: else
	fi;
	do
	:: atomic {
		d_step { OLDEST(current - 1, MERGED || ADOPTION_DROPS); CLEAN };
		if
		:: n == 0 -> break
		:: else
		fi;
		STEP("process|KILLED before it can drop an epoch that was merged\n",
			printf("process|another one begins; it drops epoch %d, which is closed\n", n);
			unpin(n);
			n = 0;
			nothingForgotten())
	}
	od;
	do
	:: atomic {
		d_step {
			OLDEST(current - 1, !closed[e]);
			for (e : 1 .. current - 1) {
				final[e] = pinned[e]
			};
			CLEAN
		};
		if
		:: n == 0 -> break
		:: else
		fi };
		finish(n);
		n = 0
	od;

job:
	atomic {
		vanish();
		CLEAN;
		at = id;
		zero = none;
		if
		:: true
		:: foreigns > 0 -> foreigns--; foreign = 1
		fi
	};

	/* bpf.Registration.Swap */
swap:
	if
	:: current > SWAPS -> goto end
	:: else
	fi;
#ifndef MISSES_SAMPLED_LATE
	takeSample();
#endif
	STEP("process|KILLED before it can pin the next epoch\n",
		pinned[current + 1] = 1;
		first[current + 1] = current + 1;
		setBase(current + 1);
		dropSample());
	STEP("process|KILLED before it can install the next epoch\n",
		old = current;
		current++;
		graceBegins();
		instantEnds();
		due = lacks[WORK];
		printf("process|swaps: epoch %d is closed, %d is current\n", old, current));
	if
	:: d_step { awaited == 0 -> final[old] = 1; instantBegins() }
#ifdef LOCK_ENDS_EARLY
	:: atomic {
		awaited != 0 && kills > 0 ->
		d_step { kills--; awaited = 0; printf("process|KILLED in the grace period\n"); vanish(); CLEAN };
		goto killed
	}
#endif
	fi;
	finish(old);
#ifdef MISSES_SAMPLED_LATE
	takeSample();
	LOCAL(setBase(current); dropSample());
#endif

	/* bpf.Registration.Fold */
	do
	:: atomic {
		d_step {
			m = 0;
			for (e : 1 .. old) {
				m = m + pinned[e]
			};
			OLDEST(old, m > RETAINED);
			x = 0;
			for (e : n + 1 .. old) {
				x = (x == 0 && pinned[e] -> e : x)
			};
			x = (n == 0 -> 0 : x);
			CLEAN
		};
		if
		:: n == 0 -> break
		:: else
		fi };
		STEP("process|KILLED before it can merge the oldest epoch\n",
			printf("process|merges epoch %d into %d\n", n, x);
			bitmap[x] = bitmap[x] | bitmap[n];
			taint[x] = taint[x] | taint[n];
			loss[x] = loss[x] | loss[n]);
		STEP("process|KILLED before it can say that it is merged\n",
			first[x] = first[n]);
		STEP("process|KILLED before it can drop the merged epoch\n",
			unpin(n);
			n = 0;
			x = 0;
			nothingForgotten())
	od;

	/* cbt.Tracked.Changes and agent.disk.advance */
	atomic { if :: true fi; d_step {
		changesSince(at, old);
		u = u || zero;
		m = (u -> ALL : m);
		pending = pending | m;
		if
		:: u -> printf("process|asks what changed since change ID %d: that is unknown, so all\n", at)
		:: else -> printf("process|asks what changed since change ID %d: granule 0: %d, granule 1: %d\n", at, m & 1, m >> 1)
		fi;
		PROPERTY(P5, !u || zero || givenup > at || UNKNOWN_HAPPENS, "a delta is unknown although no event was lost\n");
		at = old;
		old = 0;
		zero = 0;
		CLEAN
	};
	if
	:: foreign -> goto commit
	:: !foreign && pending == 0 && again ->
#ifdef INSTANTS
		d_step {
			printf("process|nothing changed between two swaps: an instant\n");
			PROPERTY(P4, !lackedEarly, "the instant lacks a write that had completed by then\n");
			PROPERTY(P4, !heldLate, "the instant holds a write that was submitted later\n")
		};
#endif
		goto commit
#ifdef INSTANTS
	:: !foreign && pending != 0 && again -> /* a pause that fails */
		d_step { failedPause = 1; printf("process|pauses the guest, in vain\n") };
		goto swap
#endif
	:: !foreign && (pending != 0 || !again)
	fi };

	/* agent.convergence.readRunning */
#if defined(INSTANTS) && defined(LOOK_BEFORE_READ)
	lookAt();
#endif
	do
	:: atomic {
		pending != 0 ->
		if
		:: (pending & 1) != 0 -> n = 1
		:: (pending & 2) != 0 -> n = 2
		fi;
		d_step {
			printf("process|reads granule %d\n", n - 1);
			pending = pending & ~n;
			due = due & ~n;
			lacks[WORK] = lacks[WORK] & ~n;
			for (e : 0 .. WRITERS - 1) {
				ahead[WORK] = (granule[e] == n -> ahead[WORK] & ~(1 << e) : ahead[WORK])
			};
#ifdef INSTANTS
			early = early & ~n;
			workLate = (workLate & ~n) | (diskLate & n);
#endif
			n = 0;
			CLEAN
		}
	}
	:: atomic { pending == 0 ->
		if
#ifdef INSTANTS
		:: !foreign -> goto look
#endif
		:: again = 1;
#ifdef INSTANTS
			failedPause = 0;
#endif
			goto swap
		:: goto commit /* the guest stands still, or the backup ends without an instant */
		fi }
	od;

#ifdef INSTANTS
	/* agent.convergence.quiet and cbt.Tracked.Quiet: no epoch is closed, no grace period awaited. */
look:
#ifndef LOOK_BEFORE_READ
	lookAt();
#endif
	atomic {
		failedPause = 0;
		if
		:: !marked ->
			d_step {
				printf("process|nothing is marked in the current epoch: an instant\n");
				PROPERTY(P4, early == 0, "the instant lacks a write that had completed by then\n");
				PROPERTY(P4, workLate == 0, "the instant holds a write that was submitted later\n")
			};
			goto commit
		:: else -> marked = 0; again = 1; goto swap
		fi
	};
#endif

commit:
#ifndef RELEASE_BEFORE_COMMIT
	COMMIT;
#endif
	do
	:: atomic {
		d_step { OLDEST(at, true); CLEAN };
		if
		:: n == 0 -> break
		:: else
		fi;
		STEP("process|KILLED before it can release an epoch\n",
			unpin(n);
			givenup = (foreign -> at : givenup);
			if
			:: foreign -> printf("process|a backup to another repository releases epoch %d\n", n)
			:: else -> printf("process|releases epoch %d\n", n)
			fi;
			n = 0;
			nothingForgotten())
	}
	od;
#ifdef RELEASE_BEFORE_COMMIT
	COMMIT;
#endif
	goto job;
end:
	false
}

init
{
	atomic {
		pinned[1] = 1;
		first[1] = 1;
#ifdef BEGINNING
		none = 1;
		granule[0] = 1;
#endif
		run writer(0);
		run writer(1);
		run process()
	}
}
