/*
 * Tidemark's garbage collection beside writers, a forgetter and other collections, none of
 * which holds a lock. docs/gc.md explains it and numbers the steps.
 *
 * Records are masks. A point refers to records; a pack holds one or two, a generation of it
 * those that it still holds. What is condemned is any choice of objects: it need not be
 * garbage.
 *
 * main.go sets the bounds and the broken variants, which are macros.
 */

#ifndef WRITERS
#define WRITERS 1     /* in all, each with one session and at most one point */
#endif
#ifndef COLLECTIONS
#define COLLECTIONS 1 /* at a time, each of any number of runs */
#endif
#ifndef DOCUMENTS
#define DOCUMENTS 1   /* of collections, in all */
#endif

#ifdef TREE
/* Records 0 and 1 are nodes of maps, 2 and 3 what these lead to; each has a pack of its own. */
#define POINTS 2 /* when it begins */
#define PACKS 4
#define HELD 15
#define NODES 3
#define IN(o) (1 << (o))
#define BELOW(nodes) ((nodes) << 2)
#else
/* Pack 0 holds records 0 and 1; writer w may store record 2 + w in a pack of its own. */
#define POINTS 1
#define PACKS (1 + WRITERS)
#ifdef ONE_RECORD
#define HELD 1
#else
#define HELD 3
#endif
#define NODES 0
#define IN(o) ((o) == 0 || (o) == PACKS -> HELD : 2 << (o))
#define BELOW(nodes) 0
#endif
#define NEEDS(r) ((r) | BELOW((r) & NODES))
#define NEW (4 << w)
#define SECOND PACKS     /* objects are numbered as packs; the last is the next generation of pack 0 */
#define POINT_OF(s) (POINTS + (s))
#define W (1 << w)
#define BIT(i) (1 << (i))

/* Objects. */
byte held = HELD;	/* records in packs' first generations */
byte held2;		/* in the second one of pack 0 */
byte points = (1 << POINTS) - 1;
byte refs[POINTS + WRITERS];
byte parent[WRITERS + 1];	/* point + 1, or 0 */
byte begun, committed, abandoned, givenup, published; /* sessions; the last is .done */
#define ENDED (committed | abandoned | givenup)
#define OPEN (begun & ~ENDED)
byte docs;		/* gc/<g> */
byte docWait, docDone;
byte cond[DOCUMENTS];	/* objects */
byte wait[DOCUMENTS];	/* sessions */
byte made;		/* documents so far */

byte started;		/* writers that have begun */
byte dead;		/* writers that are known to be gone */
byte acting[COLLECTIONS]; /* the document + 1 that it has looked at and acts upon */

#ifdef SHORTEST
#define SCRATCH byte
#else
#define SCRATCH hidden byte
#endif
SCRATCH i, x;
#define CLEAN i = 0; x = 0

#define ROOTS_OF(s) (parent[s] == 0 -> 0 : refs[parent[s] - 1])

#define PROPERTY(name, ok, text) \
	if \
	:: (ok) \
	:: else -> printf("%e|violated: ", name); printf(text); assert(false) \
	fi

mtype = { G1 };

/* G1, whenever a point appears or an object goes. */
inline nothingLost()
{
	for (i : 0 .. POINTS + WRITERS - 1) {
		PROPERTY(G1, (points & BIT(i)) == 0 || (NEEDS(refs[i]) & ~(held | held2)) == 0, "a point that exists refers to a record that no object holds\n")
	}
}

inline begin()
{
	begun = begun | W;
	started = started | W
}

inline listCondemned()
{
#ifndef CONDEMNED_NOT_LISTED
	for (i : 0 .. DOCUMENTS - 1) {
		x = x | ((docs & BIT(i)) != 0 -> cond[i] : 0)
	}
	x = x | ((x & BIT(SECOND)) != 0 -> 1 : 0); /* whatever generation */
	for (i : 0 .. PACKS - 1) {
		avoid = avoid | ((x & BIT(i)) != 0 -> IN(i) : 0)
	}
	printf("writer %d|lists what is condemned: packs %d\n", w, x & (BIT(PACKS) - 1))
#else
	printf("writer %d|does not list what is condemned\n", w)
#endif
}

/* The references of the new point: any of the parent's, any that were found, a new one. */
inline choose()
{
#ifdef ONE_RECORD
	if
	:: parent[w] != 0 -> mine = ROOTS_OF(w)
	:: (found & 1) != 0 -> mine = 1
	:: (found & 4) != 0 -> mine = 4
	:: (found & 8) != 0 -> mine = 8
	:: mine = NEW
	fi
#else
	if
	:: parent[w] != 0 && (ROOTS_OF(w) & 1) != 0 -> mine = mine | 1
	:: true
	fi;
	if
	:: parent[w] != 0 && (ROOTS_OF(w) & ~1 & ~found) != 0 -> mine = mine | (ROOTS_OF(w) & ~1)
	:: true
	fi;
	do
	:: x < 4 && (found & BIT(x) & ~mine) != 0 -> mine = mine | BIT(x); x++
	:: x < 4 -> x++
	:: x == 4 -> break
	od;
	if
	:: mine != 0
	:: PACKS > 1 && NODES == 0 -> mine = mine | NEW
	fi;
	x = 0
#endif
}

proctype writer(byte w)
{
	byte avoid, found, mine;

	/* Which of those that have not begun is next makes no difference. */
end0:	atomic {
		w == 0 || (started & (1 << (w - 1))) != 0 ->
		if
		:: (points & BIT(0)) != 0 -> parent[w] = 1
		:: (points & BIT(1)) != 0 -> parent[w] = 2
		:: POINTS + WRITERS > 2 && (points & BIT(2)) != 0 -> parent[w] = 3
		:: POINTS + WRITERS > 3 && (points & BIT(3)) != 0 -> parent[w] = 4
		:: true
		fi;
#ifdef INDEX_LISTED_FIRST
		found = held | held2;
#endif
		if
		:: parent[w] != 0 -> printf("writer %d|reads its parent, point %d, which refers to records %d\n", w, parent[w] - 1, ROOTS_OF(w))
		:: else -> printf("writer %d|begins without a parent\n", w)
		fi
	};
#ifdef SESSION_AFTER_CHECK
	if
	:: atomic { parent[w] != 0 && (points & BIT(parent[w] - 1)) == 0 -> goto end }
	:: atomic { parent[w] == 0 || (points & BIT(parent[w] - 1)) != 0 -> printf("writer %d|sees that its parent is still there\n", w) }
	fi;
#endif
	d_step { begin(); printf("writer %d|creates session %d\n", w, w); CLEAN };
#if !defined(PARENT_NOT_CHECKED_AGAIN) && !defined(SESSION_AFTER_CHECK)
	if
	:: atomic {
		parent[w] != 0 && (points & BIT(parent[w] - 1)) == 0 ->
		abandoned = abandoned | ((ENDED & W) == 0 -> W : 0);
		printf("writer %d|sees that its parent is gone, and abandons the session\n", w);
		goto end
	}
	:: atomic { parent[w] != 0 && (points & BIT(parent[w] - 1)) != 0 -> printf("writer %d|sees that its parent is still there\n", w) }
	:: atomic { parent[w] == 0 }
	fi;
#endif
	d_step { listCondemned(); CLEAN };
	atomic {
#ifndef INDEX_LISTED_FIRST
		found = held | held2;
#endif
		found = found & ~avoid;
		avoid = 0;
		/* Only what can be found whole: it reads the nodes that it refers to. */
		found = (NODES == 0 -> found : 0);
		choose();
		printf("writer %d|lists packs; its point will refer to records %d, of which records %d are found there\n", w, mine, mine & found & ~ROOTS_OF(w));
		found = 0;
		if
		:: mine == 0 -> goto end
		:: else
		fi
	};
	if
	:: d_step { NODES == 0 && (mine & NEW) != 0 && (mine & NEW & ROOTS_OF(w)) == 0 && (held & NEW) == 0 -> held = held | NEW; printf("writer %d|writes pack %d with record %d\n", w, 1 + w, 2 + w) }
	:: atomic { NODES != 0 || (mine & NEW) == 0 }
	fi;
	if
	:: atomic { (ENDED & W) != 0 ->
		printf("writer %d|sees that it was given up\n", w)
#ifndef NO_FENCE
		; mine = 0; parent[w] = 0; goto end
#endif
	   }
	:: d_step { (ENDED & W) == 0 ->
		committed = committed | W;
		refs[POINT_OF(w)] = mine;
		printf("writer %d|creates session %d's end: it will publish point %d\n", w, w, POINT_OF(w)) }
	:: atomic { (ENDED & W) == 0 ->
		abandoned = abandoned | W;
		printf("writer %d|abandons its session\n", w);
		mine = 0;
		goto end }
	fi;
	if
	:: d_step {
		refs[POINT_OF(w)] = mine;
		mine = 0;
		points = points | BIT(POINT_OF(w));
		printf("writer %d|publishes point %d\n", w, POINT_OF(w));
		nothingLost();
		CLEAN
	}
	:: atomic { dead = dead | W; mine = 0; printf("writer %d|is KILLED\n", w); goto end }
	fi;
	d_step { published = published | W; printf("writer %d|says that it has published\n", w) };
end:
	false
}

/* Points are forgotten, and sessions given up, by whoever and at any time. */
#define FORGET(p) d_step { (points & BIT(p)) != 0 -> points = points & ~BIT(p); printf("forget|deletes point %d\n", p) }
#define GIVE_UP(s) d_step { (OPEN & BIT(s)) != 0 -> givenup = givenup | BIT(s); printf("a gc|gives session %d up\n", s) }

proctype others()
{
end:
	do
	:: FORGET(0)
#if POINTS + WRITERS > 1
	:: FORGET(1)
#endif
#if POINTS + WRITERS > 2
	:: FORGET(2)
#endif
#if POINTS + WRITERS > 3
	:: FORGET(3)
#endif
#if WRITERS > 0
	:: GIVE_UP(0)
#endif
#if WRITERS > 1
	:: GIVE_UP(1)
#endif
	od
}

#define IN_FORCE(g) ((docs & ~docDone & BIT(g)) != 0)

/* Sessions that protect nothing any more. */
inline seeOver()
{
	for (i : 0 .. WRITERS - 1) {
		if
		:: (begun & BIT(i)) != 0 && ((abandoned | published) & BIT(i)) != 0 -> x = x | BIT(i)
		:: (begun & committed & BIT(i)) != 0 && ((points & BIT(POINT_OF(i))) != 0 || (dead & BIT(i)) != 0) -> x = x | BIT(i)
		:: else
		fi
	}
}

inline dropSession(s)
{
	begun = begun & ~BIT(s);
	committed = committed & ~BIT(s);
	abandoned = abandoned & ~BIT(s);
	published = published & ~BIT(s)
}

/* What roots lead to. In failed: something on the way is gone. */
inline follow(r)
{
	x = (r) & NODES & ~marks; /* a node that is marked has been walked */
	marks = marks | (r);
	if
	:: (x & ~held) == 0 -> marks = marks | BELOW(x)
	:: else -> failed = 1
	fi;
	x = 0
}

/* A step that may be a goto's aim. */
#define LOCAL(...) \
	if \
	:: d_step { __VA_ARGS__; CLEAN } \
	fi

/* A listing begins, and comes past the objects one by one, in any order, or all at once. */
#ifdef SLOW_LISTINGS
#define PASS(i, objects, shown) d_step { (cur & BIT(i)) != 0 -> cur = cur & ~BIT(i); shown = shown | (objects & BIT((i) & 3)) }

inline listPoints()
{
	LOCAL(cur = BIT(POINTS + WRITERS) - 1; printf("gc %d|begins to list points\n", c));
	do
	:: PASS(0, points, todo)
	:: PASS(1, points, todo)
	:: PASS(2, points, todo)
	:: PASS(3, points, todo)
	:: atomic { cur == 0 -> printf("gc %d|has listed points: %d\n", c, todo); break }
	od
}

inline listSessions()
{
	LOCAL(cur = (BIT(WRITERS) - 1) * 17; printf("gc %d|begins to list sessions\n", c));
	do
	:: PASS(0, begun, todo)
	:: PASS(1, begun, todo)
	:: PASS(4, ENDED, ends)
	:: PASS(5, ENDED, ends)
	:: atomic { cur == 0 -> todo = todo | ends; printf("gc %d|has listed sessions: %d, and ends: %d\n", c, todo, ends); break }
	od
}
#else
inline listPoints()
{
	LOCAL(todo = points; printf("gc %d|lists points: %d\n", c, todo))
}

inline listSessions()
{
	LOCAL(todo = begun | ENDED; ends = ENDED; printf("gc %d|lists sessions: %d, and ends: %d\n", c, begun, ends))
}
#endif

inline readSessions()
{
	do
	:: d_step { todo != 0 ->
		do
		:: (todo & BIT(n)) == 0 -> n++
		:: else -> break
		od;
		cur = 0;
		if
#ifndef ENDED_NOT_FOLLOWED
		:: (ends & committed & BIT(n)) != 0 -> cur = refs[POINT_OF(n)]
#endif
#ifndef OPEN_NOT_FOLLOWED
		:: (ends & BIT(n)) == 0 && (begun & BIT(n)) != 0 -> cur = ROOTS_OF(n)
#endif
		:: else
		fi;
#ifdef ORPHANS_NOT_GIVEN_UP
		cur = ((ignored & BIT(n)) != 0 -> 0 : cur);
#endif
		todo = todo & ~BIT(n);
		printf("gc %d|reads session %d, and marks from records %d\n", c, n, cur);
#if NODES == 0
		follow(cur);
		cur = 0;
		n = 0;
#endif
		CLEAN
	}
#if NODES != 0
		; d_step { follow(cur); cur = 0; CLEAN }
		if
		:: d_step { !failed -> n = 0 }
		:: atomic { failed && (begun & BIT(n)) == 0 -> n = 0; failed = 0; goto anew }
		:: atomic { failed && (ends & BIT(n)) == 0 && parent[n] != 0 && (points & BIT(parent[n] - 1)) == 0 ->
#ifdef ORPHANS_NOT_GIVEN_UP
			ignored = ignored | BIT(n);
#else
			givenup = givenup | (OPEN & BIT(n)); /* or finds how it has ended */
			printf("gc %d|gives session %d up, whose parent is gone\n", c, n);
#endif
			n = 0; failed = 0; goto anew }
		:: atomic { failed && (published & BIT(n)) != 0 && (points & BIT(POINT_OF(n))) == 0 ->
			n = 0; failed = 0; goto anew }
		/* Else it is damage: nothing is deleted. */
		fi
#endif
	:: atomic { todo == 0 -> ends = 0; n = 0; break }
	od
}

proctype collection(byte c)
{
	byte g, marks, todo, ends, n, cur;
	bit newer, failed;
#ifdef ORPHANS_NOT_GIVEN_UP
	byte ignored;
#endif

end:
	atomic {
		g = 0; marks = 0; todo = 0; ends = 0; n = 0; cur = 0; newer = 0; failed = 0; acting[c] = 0;
		CLEAN;
end1:		if
		/* Collections are alike. */
		:: made < DOCUMENTS && (made > 0 || c == 0) -> goto condemn
		:: IN_FORCE(0) -> goto settle
		:: DOCUMENTS > 1 && IN_FORCE(1) -> g = 1; goto settle
		:: d_step { (docs & docDone) != 0 ->
			g = ((docs & docDone & 1) != 0 -> 0 : 1);
#ifndef NO_GRACE
			for (i : 0 .. COLLECTIONS - 1) {
				x = x || acting[i] == g + 1
			}
#endif
			if
			:: x == 0 -> docs = docs & ~BIT(g); printf("gc %d|deletes document %d\n", c, g)
			:: else
			fi;
			CLEAN
		   }
		   goto end
		:: begun != 0 -> goto sessions
#if COLLECTIONS > 1
		:: made < DOCUMENTS && c > 0 -> goto leftovers
#endif
		fi
	};

condemn:
#ifdef WAIT_LISTED_FIRST
	LOCAL(todo = OPEN; printf("gc %d|lists sessions: %d are open\n", c, todo));
#endif
	atomic {
		if
		:: made == DOCUMENTS -> todo = 0; goto end
		:: else
		fi;
		do
		:: n <= PACKS && (n == SECOND -> held2 : held & IN(n)) != 0 -> x = x | BIT(n); n++
#ifdef ALL_CONDEMNED
		:: n <= PACKS && (n == SECOND -> held2 : held & IN(n)) == 0 -> n++
#else
		:: n <= PACKS -> n++
#endif
		:: n > PACKS -> break
		od;
		n = 0;
		if
		:: x == 0 -> todo = 0; goto end
		:: else
		fi;
		cond[made] = x;
		x = 0;
		docs = docs | BIT(made);
#ifdef WAIT_LISTED_FIRST
		wait[made] = todo;
		docWait = docWait | BIT(made);
#endif
		made++;
		printf("gc %d|creates document %d, which condemns objects %d\n", c, made - 1, cond[made - 1]);
		goto end
	};

settle:
	LOCAL(newer = (held2 != 0);
		todo = OPEN;
		printf("gc %d|takes document %d up\n", c, g));
	d_step {
		if
		:: (docWait & BIT(g)) == 0 ->
			docWait = docWait | BIT(g);
			wait[g] = todo;
			printf("gc %d|says for which sessions document %d waits: %d\n", c, g, wait[g])
		:: else
		fi;
		todo = wait[g]
	};
#ifdef MARKED_BEFORE_WAIT
	goto anew;
waiting:
	todo = wait[g];
#endif
#ifndef NO_WAIT
	atomic { (todo & OPEN) == 0 -> todo = 0; printf("gc %d|sees that none of these is open\n", c) };
#endif
#ifdef MARKED_BEFORE_WAIT
	goto look;
#endif
anew:
	LOCAL(marks = 0; todo = 0; ends = 0);
#ifdef POINTS_AFTER_SESSIONS
	listSessions();
	readSessions();
#endif
	listPoints();
	do
	:: d_step { todo != 0 ->
		do
		:: (todo & BIT(n)) == 0 -> n++
		:: else -> break
		od;
		todo = todo & ~BIT(n);
		if
		:: (points & BIT(n)) != 0 -> cur = refs[n]; printf("gc %d|reads point %d, and marks from records %d\n", c, n, cur)
		:: else -> printf("gc %d|sees that point %d is gone\n", c, n)
		fi;
#if NODES == 0
		follow(cur);
		cur = 0;
		n = 0;
#endif
		CLEAN
	}
#if NODES != 0
		; d_step { follow(cur); cur = 0;
			if
			:: failed -> printf("gc %d|finds that a node is gone which point %d leads to\n", c, n)
			:: else
			fi;
			CLEAN };
		if
		:: d_step { !failed -> n = 0 }
		:: atomic { failed && (points & BIT(n)) == 0 -> failed = 0;
			printf("gc %d|sees that point %d is gone\n", c, n);
			n = 0
#ifndef NO_RESTART
			; goto anew
#endif
			}
		fi
#endif
	:: atomic { todo == 0 -> n = 0; break }
	od;
#ifndef POINTS_AFTER_SESSIONS
	listSessions();
	readSessions();
#endif
#ifdef MARKED_BEFORE_WAIT
	goto waiting;
#endif

look:
#ifndef NO_LOOK
	if
	:: atomic { !IN_FORCE(g) -> printf("gc %d|sees that document %d is over\n", c, g); goto end }
	:: d_step { IN_FORCE(g) -> acting[c] = g + 1; printf("gc %d|sees that document %d is in force\n", c, g) }
	fi;
#else
	LOCAL(acting[c] = g + 1);
#endif
#ifdef DOCUMENT_DELETED_FIRST
	d_step { docs = docs & ~BIT(g); printf("gc %d|deletes document %d\n", c, g) };
#endif
	n = 0;
	do
	:: d_step { n <= PACKS && (cond[g] & BIT(n)) == 0 -> n++ }
	:: atomic { n <= PACKS && (cond[g] & BIT(n)) != 0 ->
		d_step { x = (n == SECOND -> held2 : held & IN(n)); cur = x; x = 0 };
		if
		:: cur == 0 || n == SECOND && (marks & cur) != 0 -> cur = 0; n++
		:: cur != 0 && ((marks & cur) == 0 || n == 0 && newer) -> cur = 0;
			d_step {
				if
				:: n == SECOND -> held2 = 0
				:: else -> held = held & ~IN(n)
				fi;
				printf("gc %d|deletes object %d\n", c, n);
				nothingLost();
				n++;
				CLEAN
			}
		:: n != SECOND && cur != 0 && (marks & cur) == cur && !(n == 0 && newer) -> cur = 0; n++
		:: n == 0 && (marks & cur) != 0 && (marks & cur) != cur && !newer -> goto compact
		:: n == 0 && (marks & cur) != 0 && (marks & cur) != cur && !newer -> cur = 0; n++ /* there is not enough garbage in it */
		fi }
	:: n > PACKS -> break
	:: false ->
compact:
#ifdef OLD_DELETED_FIRST
		LOCAL(cur = held & 3; held = held & ~3; printf("gc %d|deletes the old generation of pack 0\n", c); nothingLost());
		d_step { held2 = (held2 == 0 -> cur & marks : held2); cur = 0; n++; printf("gc %d|creates the next generation of pack 0\n", c) }
#else
		LOCAL(held2 = (held2 == 0 -> cur & marks : held2); cur = 0; printf("gc %d|creates the next generation of pack 0, with records %d\n", c, held2));
		d_step { held = held & ~3; n++; printf("gc %d|deletes the old generation of pack 0\n", c); nothingLost(); CLEAN }
#endif
	od;
	atomic {
		acting[c] = 0;
#ifndef DOCUMENT_DELETED_FIRST
		if
		:: COLLECTIONS == 1 -> docs = docs & ~BIT(g); printf("gc %d|deletes document %d\n", c, g)
		:: COLLECTIONS > 1 && IN_FORCE(g) -> docDone = docDone | BIT(g); printf("gc %d|says that document %d is over\n", c, g)
		:: COLLECTIONS > 1 && !IN_FORCE(g)
		fi;
#endif
		goto end
	};

#if COLLECTIONS > 1
	/* A listing shows what was there when it began, and of what is created or deleted
	 * meanwhile anything. */
leftovers:
	atomic {
		if
		:: made == DOCUMENTS -> goto end
		:: else
		fi;
		g = made;
		printf("gc %d|lists documents: %d is not there\n", c, g)
	};
	atomic { (docWait & BIT(g)) != 0 -> printf("gc %d|lists what document %d waits for, and takes that for left over\n", c, g) };
	atomic {
#ifdef LEFTOVERS_NOT_LOOKED_AT
		docs = docs & ~BIT(g);
		docWait = docWait & ~BIT(g);
		printf("gc %d|deletes document %d and what it waits for\n", c, g);
#endif
		/* Otherwise it sees that the document is there, or that it is gone for good. */
		goto end
	};
#endif

sessions:
	skip;
#ifdef FORCE_LOOKED_AT_FIRST
	if
	:: atomic { (docs & ~docDone) != 0 -> goto end }
	:: atomic { (docs & ~docDone) == 0 -> printf("gc %d|sees no document in force\n", c) }
	fi;
#endif
	d_step { seeOver(); todo = x; printf("gc %d|sees which sessions are over: %d\n", c, todo); CLEAN };
#if !defined(SESSIONS_DELETED_IN_FORCE) && !defined(FORCE_LOOKED_AT_FIRST)
	if
	:: atomic { (docs & ~docDone) != 0 -> goto end }
	:: atomic { (docs & ~docDone) == 0 -> printf("gc %d|sees no document in force\n", c) }
	fi;
#endif
	do
	:: d_step { todo != 0 ->
		do
		:: (todo & BIT(n)) == 0 -> n++
		:: else -> break
		od;
		todo = todo & ~BIT(n);
		dropSession(n);
		printf("gc %d|deletes session %d\n", c, n);
		n = 0
	}
	:: atomic { todo == 0 -> goto end }
	od
}

init
{
	atomic {
#ifdef TREE
		refs[0] = 3;
		refs[1] = 2;
#else
		refs[0] = 1;
#endif
#if WRITERS > 0
		run writer(0);
#endif
#if WRITERS > 1
		run writer(1);
#endif
		run others();
		run collection(0);
#if COLLECTIONS > 1
		run collection(1)
#endif
	}
}
